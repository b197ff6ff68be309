// The program edgehp-pose: an artifact and photos in, the lines of `edgehp predict` out.
#include <filesystem>
#include <fstream>
#include <iostream>

#include <nlohmann/json.hpp>
#include <opencv2/imgcodecs.hpp>

#include "edgehp.hpp"

namespace {

using edgehp::Error;
using json = nlohmann::ordered_json;

// NaN becomes null in JSON.
double rounded(double value, int digits) {
    return std::stod(cv::format("%.*f", digits, value));
}

json named(const float* values) {
    return {{"pitch", rounded(values[0], 2)}, {"yaw", rounded(values[1], 2)},
            {"roll", rounded(values[2], 2)}};
}

// The poses of one photo as JSON lines; false where it cannot be used. `listed` says where the
// faces are: {"file": [{"bbox": [x_min, y_min, x_max, y_max]}]}, in pixels as they are stored.
bool print_poses(edgehp::HeadPose& network, const std::string& path, const json* listed) {
    const std::string name = std::filesystem::path(path).filename().string();
    json line{{"source", path}, {"file", name}, {"frame", nullptr}, {"seconds", nullptr},
              {"state", "unreadable"}};
    for (const char* key : {"face", "box", "detector", "angles", "spread", "confidence",
                            "out_of_range", "problem"})
        line[key] = nullptr;
    try {
        // As stored: boxes refer to those pixels. With EXIF's orientation there are none.
        const cv::Mat photo = cv::imread(
            path, cv::IMREAD_COLOR | (listed ? cv::IMREAD_IGNORE_ORIENTATION : 0));
        if (photo.empty()) throw Error(EDGEHP_DATA, path + ": cannot be read as a photo");
        std::vector<edgehp_box> boxes;
        if (!listed) boxes.push_back({0, 0, double(photo.cols), double(photo.rows)});
        else if (!listed->contains(name)) throw Error(EDGEHP_DATA, name + ": not in the box list");
        else
            for (const json& face : listed->at(name)) {
                const std::array<double, 4> corners = face.at("bbox");
                boxes.push_back({corners[0], corners[1], corners[2], corners[3]});
            }
        const auto poses = network.infer(photo, boxes, EDGEHP_BGR);
        for (std::size_t i = 0; i < poses.size(); ++i) {
            const edgehp_pose& pose = poses[i];
            const bool doubtful = pose.has_spread ? pose.confidence < 0.5F : pose.out_of_range;
            line["state"] = pose.usable ? "ok" : doubtful ? "low_confidence" : "out_of_range";
            line["face"] = i;
            line["box"] = {rounded(boxes[i].x_min, 1), rounded(boxes[i].y_min, 1),
                           rounded(boxes[i].x_max, 1), rounded(boxes[i].y_max, 1)};
            line["angles"] = named(pose.angles);
            if (pose.has_spread) line["spread"] = named(pose.spread);
            line["confidence"] = rounded(pose.confidence, 4);
            line["out_of_range"] = pose.out_of_range != 0;
            std::cout << line.dump() << std::endl;
        }
        return true;
    } catch (const Error& error) {
        if (error.status == EDGEHP_ENVIRONMENT) throw;
        line["problem"] = error.what();
        std::cout << line.dump(-1, ' ', true, json::error_handler_t::replace) << std::endl;
        return false;
    }
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<std::string> names(argv + 1, argv + argc);
    json listed;
    try {
        if (names.size() > 2 && names[1] == "--boxes") {
            std::ifstream file(names[2], std::ios::binary);
            listed = json::parse(file);
            names.erase(names.begin() + 1, names.begin() + 3);
        }
        if (names.empty() || names[0][0] == '-' || (names.size() > 1 && names[1][0] == '-')) {
            std::cerr << "usage: edgehp-pose ARTIFACT [--boxes FILE] [PHOTO...]\n\n"
                         "Check the artifact, open its engine, run its golden vectors, and print\n"
                         "the poses in the photos as 'edgehp predict' does. Without --boxes a\n"
                         "photo is one face.\n";
            return EDGEHP_USAGE;
        }
        edgehp::HeadPose network(names[0]);
        int unreadable = 0;
        for (std::size_t i = 1; i < names.size(); ++i)
            unreadable += !print_poses(network, names[i], listed.is_null() ? nullptr : &listed);
        return unreadable ? EDGEHP_DATA : EDGEHP_OK;
    } catch (const Error& error) {
        std::cerr << "edgehp-pose: error: " << error.what() << '\n';
        return error.status;
    } catch (const json::exception& error) {
        std::cerr << "edgehp-pose: error: the list of boxes: " << error.what() << '\n';
        return EDGEHP_DATA;
    } catch (const std::exception& error) {
        std::cerr << "edgehp-pose: error: " << error.what() << '\n';
        return EDGEHP_ENVIRONMENT;
    }
}
