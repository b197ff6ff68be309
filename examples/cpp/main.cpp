// The program edgehp-pose: an artifact and photos in, the lines of `edgehp predict` out.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>

#include <opencv2/imgcodecs.hpp>

#include "edgehp.hpp"

namespace {

using edgehp::Box;
using edgehp::Error;
using edgehp::json::escaped;
using edgehp::json::number;

constexpr const char* usage =
    "usage: edgehp-pose ARTIFACT [--boxes FILE] [--threads N] [--seconds N] [PHOTO...]\n"
    "\n"
    "Check the artifact, open its engine, run its golden vectors, and print the poses in the\n"
    "photos as 'edgehp predict' does. Without --boxes a photo is one face. --seconds measures\n"
    "single crops for that long instead.\n";

using Boxes = std::map<std::string, std::vector<Box>>;

// {"file": [{"bbox": [x_min, y_min, x_max, y_max]}]}, in pixels as they are stored.
Boxes read_boxes(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    try {
        const auto list = edgehp::json::parse(text);
        Boxes found;
        for (std::size_t i = 0; i < list.keys.size(); ++i)
            for (const auto& face : list.items[i].items) {
                const auto& corners = face["bbox"].items;
                if (corners.size() != 4) throw edgehp::json::Fault("a bbox has four numbers");
                found[list.keys[i]].push_back({corners[0].number(), corners[1].number(),
                                               corners[2].number(), corners[3].number()});
            }
        return found;
    } catch (const edgehp::json::Fault& fault) {
        throw Error(EDGEHP_DATA, path + ": expected a JSON list of face boxes: " + fault.what());
    }
}

std::string rounded(double value, int digits) {
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", digits, value);
    return number(std::isfinite(value) ? std::strtod(text, nullptr) : value);
}

std::string named(const float* values) {
    return "{\"pitch\":" + rounded(values[0], 2) + ",\"yaw\":" + rounded(values[1], 2) +
           ",\"roll\":" + rounded(values[2], 2) + "}";
}

// The poses of one photo as JSON lines; false where it cannot be used.
bool print_poses(edgehp::HeadPose& network, const std::string& path, const Boxes* boxes) {
    const std::string name = std::filesystem::path(path).filename().string();
    const std::string where = "{\"source\":" + escaped(path) + ",\"file\":" + escaped(name) +
                              ",\"frame\":null,\"seconds\":null,\"state\":";
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
            const Box& box = faces[i];
            const char* state = pose.confidence < 0.5 ? "low_confidence"
                                : pose.out_of_range   ? "out_of_range" : "ok";
            std::cout << where << '"' << state << "\",\"face\":" << i << ",\"box\":["
                      << rounded(box.x_min, 1) << ',' << rounded(box.y_min, 1) << ','
                      << rounded(box.x_max, 1) << ',' << rounded(box.y_max, 1)
                      << "],\"detector\":null,\"angles\":" << named(pose.angles)
                      << ",\"spread\":" << named(pose.spread)
                      << ",\"confidence\":" << rounded(pose.confidence, 4)
                      << ",\"out_of_range\":" << (pose.out_of_range ? "true" : "false")
                      << ",\"problem\":null}" << std::endl;
        }
        return true;
    } catch (const Error& error) {
        if (error.status == EDGEHP_ENVIRONMENT) throw;
        std::cout << where << "\"unreadable\",\"face\":null,\"box\":null,\"detector\":null,"
                  << "\"angles\":null,\"spread\":null,\"confidence\":null,\"out_of_range\":null,"
                  << "\"problem\":" << escaped(error.what()) << '}' << std::endl;
        return false;
    }
}

// Time single crops for `seconds`, after a tenth of it unmeasured; one JSON line.
void measure(edgehp::HeadPose& network, double seconds) {
    using Clock = std::chrono::steady_clock;
    const std::vector<std::uint8_t> crop(
        3u * static_cast<unsigned>(network.engine().size * network.engine().size), 128);
    float angles[3], spread[3];
    std::vector<double> times;
    const auto began = Clock::now();
    for (double passed = 0; passed < 1.1 * seconds;) {
        const auto before = Clock::now();
        network.engine().infer(crop.data(), 1, angles, spread);
        const auto after = Clock::now();
        passed = std::chrono::duration<double>(after - began).count();
        if (passed > 0.1 * seconds)
            times.push_back(std::chrono::duration<double, std::milli>(after - before).count());
    }
    std::sort(times.begin(), times.end());
    const auto percentile = [&](double share) {
        return rounded(times[static_cast<std::size_t>(share * (times.size() - 1))], 4);
    };
    std::ifstream status("/proc/self/status");
    long resident = 0, peak = 0;
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmRSS:", 0) == 0) resident = std::atol(line.c_str() + 6);
        if (line.rfind("VmHWM:", 0) == 0) peak = std::atol(line.c_str() + 6);
    }
    std::cout << "{\"calls\":" << times.size() << ",\"p50_ms\":" << percentile(0.5)
              << ",\"p99_ms\":" << percentile(0.99) << ",\"rss_mib\":" << rounded(resident / 1024.0, 1)
              << ",\"peak_rss_mib\":" << rounded(peak / 1024.0, 1) << "}\n";
}

int run(const std::vector<std::string>& arguments) {
    std::vector<std::string> names;
    std::map<std::string, std::string> options;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string& argument = arguments[i];
        if (argument == "--boxes" || argument == "--threads" || argument == "--seconds") {
            if (i + 1 == arguments.size()) throw Error(EDGEHP_USAGE, argument + " needs a value");
            options[argument] = arguments[++i];
        } else if (argument == "--help" || argument == "-h") {
            std::cout << usage;
            return 0;
        } else if (argument.rfind("--", 0) == 0) {
            throw Error(EDGEHP_USAGE, "no option " + argument);
        } else {
            names.push_back(argument);
        }
    }
    if (names.empty()) throw Error(EDGEHP_USAGE, std::string("no artifact was named\n") + usage);
    Boxes boxes;
    if (options.count("--boxes")) boxes = read_boxes(options["--boxes"]);
    edgehp::HeadPose network(names[0], std::atoi(options["--threads"].c_str()));
    std::cerr << "edgehp-pose: " << network.artifact().path << ": golden vectors within "
              << rounded(network.golden_error(), 3) << " degrees\n";
    if (const double seconds = std::atof(options["--seconds"].c_str()); seconds > 0) {
        measure(network, seconds);
        return 0;
    }
    int unreadable = 0;
    for (std::size_t i = 1; i < names.size(); ++i)
        unreadable += !print_poses(network, names[i], options.count("--boxes") ? &boxes : nullptr);
    return unreadable ? EDGEHP_DATA : EDGEHP_OK;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run({argv + 1, argv + argc});
    } catch (const Error& error) {
        std::cerr << "edgehp-pose: error: " << error.what() << '\n';
        return error.status;
    } catch (const std::exception& error) {
        std::cerr << "edgehp-pose: error: " << error.what() << '\n';
        return EDGEHP_ENVIRONMENT;
    }
}
