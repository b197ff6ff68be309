// Head poses from an edgehp artifact. docs/cpp.md is the manual; edgehp.h is the same for C.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <opencv2/core.hpp>

#include "edgehp.h"
#include "json.hpp"

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
    virtual std::vector<Gpu> gpus() const;                     // in the driver's order
    virtual std::optional<std::string> module() const;         // of a Jetson
    virtual std::optional<std::string> version(const std::string& kind) const;  // of a runtime
};

// An artifact whose manifest, device and bytes were checked.
struct Artifact {
    std::string path;
    json::Value manifest;
    Preprocessing preprocessing;

    std::string engine_kind() const { return manifest["engine"]["kind"].text; }
    std::string engine_path() const;
};

// Check an artifact directory; nothing in it is deserialised. Error: anything is wrong with it.
Artifact load_artifact(const std::string& path, const Device& device = Device());

// An opened engine; one thread at a time may use it.
class Engine {
public:
    virtual ~Engine() = default;
    // Angles and spreads [count, 3] in degrees of uint8 RGB crops [count, size, size, 3].
    virtual void infer(const std::uint8_t* crops, int count, float* angles, float* spread) = 0;
    int size = 0;
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
    double first_bin_ = -99, last_bin_ = 99, golden_error_ = 0;
    std::vector<std::uint8_t> crops_;
};

}  // namespace edgehp
