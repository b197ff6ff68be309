// Head poses from an edgehp artifact. docs/cpp.md is the manual; edgehp.h is the same for C.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <opencv2/core.hpp>

#include "edgehp.h"

namespace edgehp {

// Everything this library throws: the sentence that the command edgehp would print, and its kind.
struct Error : std::runtime_error {
    Error(edgehp_status kind, const std::string& what) : std::runtime_error(what), status(kind) {}
    edgehp_status status;
};

// Throw an Error of these parts unless it is `right`.
template <typename... Parts>
void require(bool right, edgehp_status otherwise, const Parts&... parts) {
    if (right) return;
    std::ostringstream what;
    (what << ... << parts);
    throw Error(otherwise, what.str());
}

// What an artifact is checked against; this machine unless told otherwise.
struct Device {
    std::vector<std::pair<std::string, std::string>> gpus;  // name, compute capability; as CUDA's
    std::optional<std::string> module;                      // of a Jetson
    std::map<std::string, std::string> versions;            // of runtimes, by kind of engine
};

// An artifact whose manifest, device and bytes were checked: what is read of its manifest.
struct Artifact {
    std::string path, target, precision;
    std::vector<std::string> compute_capabilities;  // of the GPUs it runs on; none on a processor
    std::optional<std::string> module;              // Jetson module it was built on
    std::string engine_kind, engine_path;
    std::map<std::string, std::string> versions;    // of the runtime and others at the build
    std::optional<int> dla_core;                    // of a Jetson, where it was built for one
    // From a picture with a face box to the network's input: edgehp/crop.py is the reference.
    int size = 0;
    bool area = true, square = true;
    double box_scale = 1;
    double first_bin = -99, last_bin = 99;          // of the network's heads, degrees
    std::string golden_path;                        // crops with known answers, in one picture
    std::vector<std::array<double, 3>> golden_angles;
    double tolerance = 0;                           // largest difference of an angle from those
    std::map<std::string, std::pair<std::string, std::int64_t>> files;  // SHA-256 and size
};

// Check an artifact directory; nothing in it is deserialised. Error: anything is wrong with it.
Artifact load_artifact(const std::string& path, const Device* told = nullptr);

// An opened engine; one thread at a time may use it.
class Engine {
public:
    virtual ~Engine() = default;
    // Angles and spreads [count, 3] in degrees of uint8 RGB crops [count, size, size, 3]; the
    // spreads are left alone where the network gives none.
    virtual void infer(const std::uint8_t* crops, int count, float* angles, float* spread) = 0;
    bool fits = false;  // it takes and gives what a head-pose engine of the artifact's size does
    bool has_spread = true;
};

// A runtime that is built in.
struct Runtime {
    std::string (*version)();
    std::unique_ptr<Engine> (*open)(const Artifact& artifact, int threads);
};
const std::map<std::string, Runtime>& runtimes();  // by kind of engine
std::vector<std::pair<std::string, std::string>> cuda_gpus();

// An artifact in use: checked, opened and proven by its golden vectors.
class HeadPose {
public:
    // `threads` of the processor; 0 leaves it to the runtime.
    explicit HeadPose(const std::string& path, int threads = 0);

    // The poses of `boxes` in `photo` (8 bits a channel), whose channels are as `pixels` says.
    std::vector<edgehp_pose> infer(const cv::Mat& photo, const std::vector<edgehp_box>& boxes,
                                   edgehp_pixels pixels);

    const Artifact artifact;

private:
    std::unique_ptr<Engine> engine_;
    void verify_golden();
};

}  // namespace edgehp
