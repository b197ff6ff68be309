// The program edgehp-pose: an artifact and photos in, the lines of `edgehp predict` out.
#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>

#include <nlohmann/json.hpp>
#include <opencv2/imgcodecs.hpp>

#include "edgehp.hpp"

namespace {

using edgehp::Box;
using edgehp::Error;
using json = nlohmann::ordered_json;
using Boxes = std::map<std::string, std::vector<Box>>;

constexpr const char* usage =
    "usage: edgehp-pose ARTIFACT [--boxes FILE] [--threads N] [PHOTO...]\n"
    "\n"
    "Check the artifact, open its engine, run its golden vectors, and print the poses in the\n"
    "photos as 'edgehp predict' does. Without --boxes a photo is one face.\n";

// {"file": [{"bbox": [x_min, y_min, x_max, y_max]}]}, in pixels as they are stored.
Boxes read_boxes(const std::string& path) {
    Boxes found;
    try {
        std::ifstream file(path, std::ios::binary);
        const json list = json::parse(file);
        for (const auto& [name, faces] : list.items())
            for (const json& face : faces) {
                const std::array<double, 4> corners = face.at("bbox");
                found[name].push_back({corners[0], corners[1], corners[2], corners[3]});
            }
    } catch (const json::exception& error) {
        throw Error(EDGEHP_DATA, path + ": expected a JSON list of face boxes: " + error.what());
    }
    return found;
}

// NaN becomes null in JSON.
double rounded(double value, int digits) {
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", digits, value);
    return std::strtod(text, nullptr);
}

json named(const float* values) {
    return {{"pitch", rounded(values[0], 2)}, {"yaw", rounded(values[1], 2)},
            {"roll", rounded(values[2], 2)}};
}

// The poses of one photo as JSON lines; false where it cannot be used.
bool print_poses(edgehp::HeadPose& network, const std::string& path, const Boxes* boxes) {
    const std::string name = std::filesystem::path(path).filename().string();
    json line{{"source", path}, {"file", name}, {"frame", nullptr}, {"seconds", nullptr},
              {"state", "unreadable"}};
    for (const char* key : {"face", "box", "detector", "angles", "spread", "confidence",
                            "out_of_range", "problem"})
        line[key] = nullptr;
    try {
        // As stored: boxes refer to those pixels. With EXIF's orientation there are none.
        const cv::Mat photo = cv::imread(
            path, cv::IMREAD_COLOR | (boxes ? cv::IMREAD_IGNORE_ORIENTATION : 0));
        if (photo.empty()) throw Error(EDGEHP_DATA, path + ": cannot be read as a photo");
        std::vector<Box> faces{{0, 0, static_cast<double>(photo.cols),
                                static_cast<double>(photo.rows)}};
        if (boxes) {
            if (!boxes->count(name)) throw Error(EDGEHP_DATA, name + ": not in the box list");
            faces = boxes->at(name);
        }
        const auto poses = network.infer(photo, faces, EDGEHP_BGR);
        for (std::size_t i = 0; i < poses.size(); ++i) {
            const edgehp::Pose& pose = poses[i];
            const bool doubtful = pose.has_spread ? pose.confidence < 0.5F : pose.out_of_range;
            line["state"] = pose.usable ? "ok" : doubtful ? "low_confidence" : "out_of_range";
            line["face"] = i;
            line["box"] = {rounded(faces[i].x_min, 1), rounded(faces[i].y_min, 1),
                           rounded(faces[i].x_max, 1), rounded(faces[i].y_max, 1)};
            line["angles"] = named(pose.angles);
            if (pose.has_spread) line["spread"] = named(pose.spread);
            line["confidence"] = rounded(pose.confidence, 4);
            line["out_of_range"] = pose.out_of_range != 0;
            std::cout << line.dump(-1, ' ', true) << std::endl;
        }
        return true;
    } catch (const Error& error) {
        if (error.status == EDGEHP_ENVIRONMENT) throw;
        line["problem"] = error.what();
        std::cout << line.dump(-1, ' ', true, json::error_handler_t::replace) << std::endl;
        return false;
    }
}

int run(const std::vector<std::string>& arguments) {
    std::vector<std::string> names;
    std::map<std::string, std::string> options;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string& argument = arguments[i];
        if (argument == "--help" || argument == "-h") {
            std::cout << usage;
            return 0;
        }
        if (argument.rfind("--", 0) != 0) {
            names.push_back(argument);
            continue;
        }
        if (argument != "--boxes" && argument != "--threads")
            throw Error(EDGEHP_USAGE, "no option " + argument);
        if (i + 1 == arguments.size()) throw Error(EDGEHP_USAGE, argument + " needs a value");
        options[argument] = arguments[++i];
    }
    if (names.empty()) throw Error(EDGEHP_USAGE, std::string("no artifact was named\n") + usage);
    const bool listed = options.count("--boxes");
    const Boxes boxes = listed ? read_boxes(options["--boxes"]) : Boxes();
    edgehp::HeadPose network(names[0], std::atoi(options["--threads"].c_str()));
    std::cerr << "edgehp-pose: " << network.artifact().path << ": golden vectors within "
              << rounded(network.golden_error(), 3) << " degrees\n";
    int unreadable = 0;
    for (std::size_t i = 1; i < names.size(); ++i)
        unreadable += !print_poses(network, names[i], listed ? &boxes : nullptr);
    return unreadable ? EDGEHP_DATA : EDGEHP_OK;
}

}  // namespace

int main(int argc, char** argv) {
    int status = EDGEHP_ENVIRONMENT;
    try {
        return run({argv + 1, argv + argc});
    } catch (const Error& error) {
        status = error.status;
        std::cerr << "edgehp-pose: error: " << error.what() << '\n';
    } catch (const std::exception& error) {
        std::cerr << "edgehp-pose: error: " << error.what() << '\n';
    }
    return status;
}
