// Head poses from an edgehp artifact. docs/cpp.md is the manual; edgehp.h is the same for C.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <opencv2/core.hpp>

#include "edgehp.h"

namespace edgehp {

// Everything this library throws: the sentence that the command edgehp would print, and its kind.
class Error : public std::runtime_error {
public:
    Error(edgehp_status kind, const std::string& what) : std::runtime_error(what), status(kind) {}
    edgehp_status status;
};

using Box = edgehp_box;
using Pose = edgehp_pose;

// From a picture with a face box to the network's input: edgehp/crop.py is the reference.
struct Preprocessing {
    int size = 0;
    std::string resize = "area", box_rule = "square";
    double box_scale = 1;
};

// Cut the face out of `photo` (8 bits, 1 or 3 channels in any order) and resize it: [size, size]
// with as many channels. Error: the box has no area inside the photo or cannot be right.
cv::Mat crop_face(const cv::Mat& photo, const Box& box, const Preprocessing& how);

// What an artifact is checked against; derive from it to say something else than this machine.
class Device {
public:
    struct Gpu {
        std::string name, compute_capability;
    };
    virtual ~Device() = default;
    virtual std::vector<Gpu> gpus() const;                     // in CUDA's order
    virtual std::optional<std::string> module() const;         // of a Jetson
    virtual std::optional<std::string> version(const std::string& kind) const;  // of a runtime
};

// An artifact whose manifest, device and bytes were checked: what is read of its manifest.
struct Artifact {
    struct File {
        std::string sha256;
        std::int64_t size = 0;
    };
    std::string path, target, precision;
    Preprocessing preprocessing;
    std::string engine_kind, engine_path;
    std::map<std::string, std::string> versions;     // of the runtime and others at the build
    std::vector<std::string> compute_capabilities;   // of the GPUs it runs on; none on a processor
    std::optional<std::string> module;               // Jetson module it was built on
    std::optional<int> dla_core;                     // of a Jetson, where it was built for one
    double first_bin = -99, last_bin = 99;           // of the network's heads, degrees
    std::string golden_path;                         // crops with known answers, one below the other
    std::vector<std::array<double, 3>> golden_angles;
    double tolerance = 0;                            // largest difference of an angle from those
    std::map<std::string, File> files;
};

// Check an artifact directory; nothing in it is deserialised. Error: anything is wrong with it.
Artifact load_artifact(const std::string& path, const Device& device = Device());

// An opened engine; one thread at a time may use it.
class Engine {
public:
    virtual ~Engine() = default;
    // Angles and spreads [count, 3] in degrees of uint8 RGB crops [count, size, size, 3]; the
    // spreads are NaN where the network gives none.
    virtual void infer(const std::uint8_t* crops, int count, float* angles, float* spread) = 0;
    int size = 0;
    bool has_spread = true;
};

// Open the engine of a checked artifact. Error: it is no head-pose engine, or the runtime failed.
std::unique_ptr<Engine> open_engine(const Artifact& artifact, int threads = 0);

// The release of the runtime of engine `kind` that is built in; none where there is not.
std::optional<std::string> runtime_version(const std::string& kind);

// Largest difference of an angle from the golden vectors in degrees. Error: too large.
double verify_golden(const Artifact& artifact, Engine& engine);

// An artifact in use: checked, opened and proven by its golden vectors.
class HeadPose {
public:
    explicit HeadPose(const std::string& artifact, int threads = 0,
                      const Device& device = Device());

    // The poses of `boxes` in `photo`, whose channels are as `pixels` says.
    std::vector<Pose> infer(const cv::Mat& photo, const std::vector<Box>& boxes,
                            edgehp_pixels pixels);

    const Artifact& artifact() const { return artifact_; }
    Engine& engine() { return *engine_; }
    double golden_error() const { return golden_error_; }

private:
    Artifact artifact_;
    std::unique_ptr<Engine> engine_;
    double golden_error_ = 0;
    std::vector<std::uint8_t> crops_;
};

}  // namespace edgehp
