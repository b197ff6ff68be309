// From a picture and boxes to angles: the crop, the golden vectors, and the interface for C.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <new>

#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>

#include "edgehp.hpp"

namespace edgehp {
namespace {

// Less of a box inside its photo is a mistake, and filling the border takes memory without bound.
constexpr double least_inside = 0.1;

template <typename... Values>
std::string format(const char* form, Values... values) {
    char text[256];
    std::snprintf(text, sizeof text, form, values...);
    return text;
}

std::string text_of(const Box& box) {
    return format("(%g, %g, %g, %g)", box.x_min, box.y_min, box.x_max, box.y_max);
}

cv::Rect cut_of(const Box& box, const Preprocessing& how) {
    const double width = box.x_max - box.x_min, height = box.y_max - box.y_min;
    for (const double value : {box.x_min, box.y_min, box.x_max, box.y_max})
        if (!(std::abs(value) <= 1e6))
            throw Error(EDGEHP_DATA, "the face box " + text_of(box) +
                                         " is not finite or beyond any photo");
    if (width <= 0 || height <= 0)
        throw Error(EDGEHP_DATA, "the face box " + text_of(box) +
                                     " is empty: x_min < x_max, y_min < y_max needed");
    if (std::min(width, height) < 6)
        throw Error(EDGEHP_DATA, "the face box " + text_of(box) +
                                     format(" is %.3g x %.3g pixels, expected 6 at least\nhint: are "
                                            "its corners in pixels of this photo?",
                                            width, height));
    const double cx = (box.x_min + box.x_max) / 2, cy = (box.y_min + box.y_max) / 2;
    if (how.box_rule == "stretch") {
        const double w = width * how.box_scale / 2, h = height * how.box_scale / 2;
        const auto whole = [](double value) { return static_cast<int>(value); };
        return {cv::Point(whole(cx - w), whole(cy - h)), cv::Point(whole(cx + w), whole(cy + h))};
    }
    const double half = std::max(width, height) * how.box_scale / 2;
    // Whole pixels rounded down, at least one.
    const auto floor = [](double value) { return static_cast<int>(std::floor(value)); };
    const int x0 = floor(cx - half), y0 = floor(cy - half);
    return {x0, y0, std::max(floor(cx + half) - x0, 1), std::max(floor(cy + half) - y0, 1)};
}

// As edgehp/runtime/records.py classifies a pose.
Pose pose_of(const float* angles, const float* spread, bool has_spread, const Artifact& artifact) {
    Pose pose{};
    double squares = 0;
    pose.has_spread = has_spread;
    for (int i = 0; i < 3; ++i) {
        const double a = pose.angles[i] = angles[i], s = pose.spread[i] = spread[i];
        const double reach = has_spread ? 2 * s : 0;
        squares += s * s;
        // Within two spreads of the outermost bin the mean is pulled inwards; so said of NaN too.
        if (has_spread ? !(a - reach >= artifact.first_bin && a + reach <= artifact.last_bin)
                       : !std::isfinite(a))
            pose.out_of_range = 1;
    }
    // One half at a spread of ten degrees.
    pose.confidence = static_cast<float>(1 / (1 + squares / 3 / 100));
    if (has_spread && !std::isfinite(angles[0] + angles[1] + angles[2] + squares))
        pose.confidence = 0, pose.out_of_range = 1;
    pose.usable = !pose.out_of_range && !(pose.confidence < 0.5F);
    return pose;
}

}  // namespace

cv::Mat crop_face(const cv::Mat& photo, const Box& box, const Preprocessing& how) {
    const cv::Rect cut = cut_of(box, how);
    const cv::Rect inside = cut & cv::Rect(0, 0, photo.cols, photo.rows);
    const double whole = static_cast<double>(cut.width) * cut.height, part = inside.area();
    if (part <= 0 || part < least_inside * whole)
        throw Error(EDGEHP_DATA,
                    format("%.0f%% of the face box ", 100 * part / std::max(whole, 1.0)) +
                        text_of(box) +
                        format(" is inside the photo of %dx%d pixels, expected %.0f%% at least\n"
                               "hint: are its corners in pixels of this photo?",
                               photo.cols, photo.rows, 100 * least_inside));
    cv::Mat face = photo(inside), crop;
    if (how.box_rule == "square" && inside != cut)
        // Isolated: the pixels beside the cut are no border, even where they are there.
        cv::copyMakeBorder(face, face, inside.y - cut.y, cut.br().y - inside.br().y,
                           inside.x - cut.x, cut.br().x - inside.br().x,
                           cv::BORDER_REPLICATE | cv::BORDER_ISOLATED);
    if (face.cols == how.size && face.rows == how.size) return face.clone();
    const bool area = how.resize == "area" && face.rows >= how.size && face.cols >= how.size;
    cv::resize(face, crop, {how.size, how.size}, 0, 0, area ? cv::INTER_AREA : cv::INTER_LINEAR);
    return crop;
}

double verify_golden(const Artifact& artifact, Engine& engine) {
    const int size = artifact.preprocessing.size;
    const auto& golden = artifact.golden_angles;
    const int count = static_cast<int>(golden.size());
    cv::Mat picture = cv::imread(artifact.golden_path, cv::IMREAD_COLOR);
    if (picture.rows != count * size || picture.cols != size)
        throw Error(EDGEHP_INCOMPATIBLE,
                    artifact.golden_path + ": found " +
                        (picture.empty() ? "no picture"
                                         : format("[%d, %d, 3]", picture.rows, picture.cols)) +
                        format(", expected %d crops of %dx%d pixels", count, size, size) +
                        "\nhint: build the artifact again");
    cv::cvtColor(picture, picture, cv::COLOR_BGR2RGB);
    double worst = -1;
    int worst_crop = 0, worst_angle = 0;
    for (int i = 0; i < count; ++i) {
        float angles[3], spread[3];
        engine.infer(picture.ptr(i * size), 1, angles, spread);
        for (int k = 0; k < 3; ++k) {
            const double error = std::abs(std::remainder(angles[k] - golden[i][k], 360.0));
            // Written so that NaN is the worst.
            if (std::isnan(worst) || error <= worst) continue;
            worst = error, worst_crop = i, worst_angle = k;
        }
    }
    if (!(worst <= artifact.tolerance)) {
        static constexpr const char* names[] = {"pitch", "yaw", "roll"};
        throw Error(EDGEHP_INCOMPATIBLE,
                    artifact.path + format(": golden crop %d gives a %s that is %.2f degrees off, "
                                           "at most %.2f allowed: ",
                                           worst_crop, names[worst_angle], std::abs(worst),
                                           artifact.tolerance) +
                        "this device does not compute what was validated\nhint: build the artifact "
                        "here again");
    }
    return worst;
}

HeadPose::HeadPose(const std::string& path, int threads, const Device& device)
    : artifact_(load_artifact(path, device)),
      engine_(open_engine(artifact_, threads)),
      golden_error_(verify_golden(artifact_, *engine_)) {}

std::vector<Pose> HeadPose::infer(const cv::Mat& photo, const std::vector<Box>& boxes,
                                  edgehp_pixels pixels) {
    const Preprocessing& how = artifact_.preprocessing;
    const std::size_t bytes = static_cast<std::size_t>(how.size) * how.size * 3;
    if (photo.empty() || photo.type() != (pixels == EDGEHP_GREY ? CV_8UC1 : CV_8UC3))
        throw Error(EDGEHP_DATA,
                    "expected a photo of 8 bits a channel, with 3 channels or, grey, 1");
    if (boxes.empty()) return {};
    crops_.resize(bytes * boxes.size());
    for (std::size_t i = 0; i < boxes.size(); ++i) {
        const cv::Mat crop = crop_face(photo, boxes[i], how);
        cv::Mat rgb(how.size, how.size, CV_8UC3, crops_.data() + i * bytes);
        if (pixels == EDGEHP_RGB)
            crop.copyTo(rgb);
        else
            cv::cvtColor(crop, rgb, pixels == EDGEHP_BGR ? cv::COLOR_BGR2RGB : cv::COLOR_GRAY2RGB);
    }
    std::vector<float> angles(3 * boxes.size()), spread(angles.size());
    engine_->infer(crops_.data(), static_cast<int>(boxes.size()), angles.data(), spread.data());
    std::vector<Pose> poses;
    for (std::size_t i = 0; i < boxes.size(); ++i)
        poses.push_back(pose_of(&angles[3 * i], &spread[3 * i], engine_->has_spread, artifact_));
    return poses;
}

#ifdef EDGEHP_OPENVINO
std::string openvino_version();
std::unique_ptr<Engine> open_openvino(const Artifact& artifact, int threads);
#endif
#ifdef EDGEHP_TENSORRT
std::string tensorrt_version();
std::vector<Device::Gpu> cuda_gpus();
std::unique_ptr<Engine> open_tensorrt(const Artifact& artifact);
#endif

std::vector<Device::Gpu> Device::gpus() const {
#ifdef EDGEHP_TENSORRT
    return cuda_gpus();
#else
    return {};  // nothing here runs on one
#endif
}

std::optional<std::string> Device::version(const std::string& kind) const {
    return runtime_version(kind);
}

std::optional<std::string> runtime_version([[maybe_unused]] const std::string& kind) {
#ifdef EDGEHP_OPENVINO
    if (kind == "openvino") return openvino_version();
#endif
#ifdef EDGEHP_TENSORRT
    if (kind == "tensorrt") return tensorrt_version();
#endif
    return std::nullopt;
}

std::unique_ptr<Engine> open_engine(const Artifact& artifact, int threads) {
    if (threads < 0 || threads > 1024)
        throw Error(EDGEHP_USAGE, std::to_string(threads) +
                                      " threads asked for; give a number from 1 to 1024");
    std::unique_ptr<Engine> engine;
#ifdef EDGEHP_OPENVINO
    if (artifact.engine_kind == "openvino") engine = open_openvino(artifact, threads);
#endif
#ifdef EDGEHP_TENSORRT
    if (artifact.engine_kind == "tensorrt") engine = open_tensorrt(artifact);
#endif
    if (!engine || engine->size != artifact.preprocessing.size)
        throw Error(EDGEHP_DATA,
                    artifact.engine_path +
                        format(": expected an engine for crops of %d pixels, found %d\n"
                               "hint: build the artifact again",
                               artifact.preprocessing.size, engine ? engine->size : 0));
    return engine;
}

}  // namespace edgehp

// The interface for C. No exception leaves it.

struct edgehp_head_pose {
    edgehp::HeadPose opened;
};

namespace {

thread_local std::string last_error;
thread_local edgehp_status last_status = EDGEHP_OK;

template <typename Action>
edgehp_status guarded(Action action) {
    last_status = EDGEHP_OK;
    last_error.clear();
    try {
        action();
    } catch (const edgehp::Error& error) {
        last_status = error.status;
        last_error = error.what();
    } catch (const std::exception& error) {
        last_status = EDGEHP_ENVIRONMENT;
        last_error = error.what();
    }
    return last_status;
}

}  // namespace

edgehp_head_pose* edgehp_open(const char* artifact, int threads) {
    edgehp_head_pose* opened = nullptr;
    guarded([&] {
        if (artifact == nullptr) throw edgehp::Error(EDGEHP_USAGE, "no artifact was named");
        opened = new edgehp_head_pose{edgehp::HeadPose(artifact, threads)};
    });
    return opened;
}

edgehp_status edgehp_infer(edgehp_head_pose* opened, const edgehp_image* image,
                           const edgehp_box* boxes, int count, edgehp_pose* poses) {
    return guarded([&] {
        const auto require = [](bool right, const char* otherwise) {
            if (!right) throw edgehp::Error(EDGEHP_USAGE, otherwise);
        };
        require(opened && image && image->data && poses, "a pointer is NULL");
        require(count >= 0 && (boxes || count == 1), "without boxes the count of faces is 1");
        const int channels = image->pixels == EDGEHP_GREY ? 1 : 3;
        require(image->width > 0 && image->height > 0 &&
                    image->stride >= static_cast<std::size_t>(image->width) * channels,
                "the image has no pixels, or its stride is less than a row");
        // OpenCV reads the caller's pixels where they are.
        const cv::Mat photo(image->height, image->width, CV_8UC(channels),
                            const_cast<std::uint8_t*>(image->data), image->stride);
        const edgehp_box all{0, 0, static_cast<double>(image->width),
                             static_cast<double>(image->height)};
        const edgehp_box* first = boxes ? boxes : &all;
        const auto found = opened->opened.infer(photo, {first, first + count}, image->pixels);
        std::copy(found.begin(), found.end(), poses);
    });
}

void edgehp_close(edgehp_head_pose* opened) { delete opened; }

const char* edgehp_last_error(void) { return last_error.c_str(); }

edgehp_status edgehp_last_status(void) { return last_status; }
