// From a picture and boxes to angles: the crop, the golden vectors, and the interface for C.
#include <algorithm>
#include <cmath>

#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>

#include "edgehp.hpp"

namespace edgehp {
namespace {

// Less of a box inside its photo is a mistake, and filling the border takes memory without bound.
constexpr double least_inside = 0.1;

// The pixels that `box` cuts out, beyond the photo too.
cv::Rect cut_of(const edgehp_box& box, const std::string& face, const Artifact& how) {
    for (const double value : {box.x_min, box.y_min, box.x_max, box.y_max})
        require(std::abs(value) <= 1e6, EDGEHP_DATA, face, " is not finite or beyond any photo");
    const double width = box.x_max - box.x_min, height = box.y_max - box.y_min;
    require(width > 0 && height > 0, EDGEHP_DATA,
            face, " is empty: x_min < x_max, y_min < y_max needed");
    require(std::min(width, height) >= 6, EDGEHP_DATA,
            face, cv::format(" is %.3g x %.3g pixels", width, height),
            ", expected 6 at least\nhint: are its corners in pixels of this photo?");
    const double cx = (box.x_min + box.x_max) / 2, cy = (box.y_min + box.y_max) / 2;
    if (!how.square) {
        const double w = width * how.box_scale / 2, h = height * how.box_scale / 2;
        const auto whole = [](double value) { return static_cast<int>(value); };
        return {cv::Point(whole(cx - w), whole(cy - h)), cv::Point(whole(cx + w), whole(cy + h))};
    }
    const double half = std::max(width, height) * how.box_scale / 2;
    const int x0 = cvFloor(cx - half), y0 = cvFloor(cy - half);
    return {x0, y0, std::max(cvFloor(cx + half) - x0, 1), std::max(cvFloor(cy + half) - y0, 1)};
}

// The face cut out of `photo` (8 bits, any channels) and resized to what the network takes.
cv::Mat crop_face(const cv::Mat& photo, const edgehp_box& box, const Artifact& how) {
    const std::string face = "the face box " + cv::format("(%g, %g, %g, %g)", box.x_min, box.y_min,
                                                          box.x_max, box.y_max);
    const cv::Rect cut = cut_of(box, face, how);
    const cv::Rect inside = cut & cv::Rect(0, 0, photo.cols, photo.rows);
    const double whole = static_cast<double>(cut.width) * cut.height, part = inside.area();
    require(part > 0 && part >= least_inside * whole, EDGEHP_DATA,
            cv::format("%.0f%% of %s is inside the photo of %dx%d pixels, expected %.0f%% at least"
                       "\nhint: are its corners in pixels of this photo?",
                       100 * part / std::max(whole, 1.0), face.c_str(), photo.cols, photo.rows,
                       100 * least_inside));
    cv::Mat pixels = photo(inside), crop;
    if (how.square && inside != cut)
        // Isolated: the pixels beside the cut are no border, even where they are there.
        cv::copyMakeBorder(pixels, pixels, inside.y - cut.y, cut.br().y - inside.br().y,
                           inside.x - cut.x, cut.br().x - inside.br().x,
                           cv::BORDER_REPLICATE | cv::BORDER_ISOLATED);
    const bool area = how.area && pixels.rows >= how.size && pixels.cols >= how.size;
    cv::resize(pixels, crop, {how.size, how.size}, 0, 0, area ? cv::INTER_AREA : cv::INTER_LINEAR);
    return crop;
}

// As edgehp/runtime/records.py classifies a pose.
edgehp_pose pose_of(const float* angles, const float* spread, bool has_spread, const Artifact& a) {
    edgehp_pose pose{};
    double squares = 0;
    pose.has_spread = has_spread;
    for (int i = 0; i < 3; ++i) {
        pose.angles[i] = angles[i], pose.spread[i] = spread[i];
        const double s = spread[i], reach = has_spread ? 2 * s : 0;
        squares += s * s;
        // Within two spreads of the outermost bin the mean is pulled inwards; so said of NaN too.
        if (has_spread ? !(angles[i] - reach >= a.first_bin && angles[i] + reach <= a.last_bin)
                       : !std::isfinite(angles[i]))
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

HeadPose::HeadPose(const std::string& path, int threads) : artifact(load_artifact(path)) {
    require(threads >= 0 && threads <= 1024, EDGEHP_USAGE, threads,
            " threads asked for; give a number from 1 to 1024");
    engine_ = runtimes().at(artifact.engine_kind).open(artifact, threads);
    require(engine_->fits, EDGEHP_DATA, artifact.engine_path,
            ": expected an engine with one uint8 input 'crops' [N, ", artifact.size, ", ",
            artifact.size, ", 3] and the float outputs 'angles' and, of networks with bins, "
            "'spread' [N, 3]\nhint: build the artifact again");
    verify_golden();
}

void HeadPose::verify_golden() {
    const int size = artifact.size, count = static_cast<int>(artifact.golden_angles.size());
    cv::Mat picture = cv::imread(artifact.golden_path, cv::IMREAD_COLOR);
    require(picture.rows == count * size && picture.cols == size, EDGEHP_INCOMPATIBLE,
            artifact.golden_path, ": found ",
            picture.empty() ? "no picture"
                            : cv::format("[%d, %d, 3]", picture.rows, picture.cols),
            ", expected ", count, " crops of ", size, "x", size,
            " pixels\nhint: build the artifact again");
    cv::cvtColor(picture, picture, cv::COLOR_BGR2RGB);
    double worst = -1;
    int worst_crop = 0, worst_angle = 0;
    for (int i = 0; i < count; ++i) {
        float angles[3], spread[3];
        engine_->infer(picture.ptr(i * size), 1, angles, spread);
        for (int k = 0; k < 3; ++k) {
            const double golden = artifact.golden_angles[static_cast<std::size_t>(i)][k];
            const double error = std::abs(std::remainder(angles[k] - golden, 360.0));
            // Written so that NaN is the worst.
            if (std::isnan(worst) || error <= worst) continue;
            worst = error, worst_crop = i, worst_angle = k;
        }
    }
    static constexpr const char* names[] = {"pitch", "yaw", "roll"};
    require(worst <= artifact.tolerance, EDGEHP_INCOMPATIBLE, artifact.path, ": golden crop ",
            worst_crop, " gives a ", names[worst_angle],
            cv::format(" that is %.2f degrees off, at most %.2f allowed: ", std::abs(worst),
                       artifact.tolerance),
            "this device does not compute what was validated\nhint: build the artifact here again");
}

std::vector<edgehp_pose> HeadPose::infer(const cv::Mat& photo, const std::vector<edgehp_box>& boxes,
                                         edgehp_pixels pixels) {
    const std::size_t count = boxes.size();
    const int side = artifact.size, sizes[] = {static_cast<int>(count), side, side};
    require(!photo.empty() && photo.type() == (pixels == EDGEHP_GREY ? CV_8UC1 : CV_8UC3),
            EDGEHP_DATA, "expected a photo of 8 bits a channel, with 3 channels or, grey, 1");
    if (boxes.empty()) return {};
    cv::Mat crops(3, sizes, CV_8UC3);
    for (std::size_t i = 0; i < count; ++i) {
        const cv::Mat crop = crop_face(photo, boxes[i], artifact);
        cv::Mat rgb(side, side, CV_8UC3, crops.ptr(static_cast<int>(i)));
        if (pixels == EDGEHP_RGB)
            crop.copyTo(rgb);
        else
            cv::cvtColor(crop, rgb, pixels == EDGEHP_BGR ? cv::COLOR_BGR2RGB : cv::COLOR_GRAY2RGB);
    }
    std::vector<float> angles(3 * count), spread(3 * count, std::nanf(""));
    engine_->infer(crops.data, sizes[0], angles.data(), spread.data());
    std::vector<edgehp_pose> poses;
    for (std::size_t i = 0; i < count; ++i)
        poses.push_back(pose_of(&angles[3 * i], &spread[3 * i], engine_->has_spread, artifact));
    return poses;
}

#ifdef EDGEHP_OPENVINO
std::string openvino_version();
std::unique_ptr<Engine> open_openvino(const Artifact& artifact, int threads);
#endif
#ifdef EDGEHP_TENSORRT
std::string tensorrt_version();
std::unique_ptr<Engine> open_tensorrt(const Artifact& artifact, int threads);
#else
std::vector<std::pair<std::string, std::string>> cuda_gpus() { return {}; }  // nothing runs on one
#endif

const std::map<std::string, Runtime>& runtimes() {
    static const std::map<std::string, Runtime> built_in = {
#ifdef EDGEHP_OPENVINO
        {"openvino", {openvino_version, open_openvino}},
#endif
#ifdef EDGEHP_TENSORRT
        {"tensorrt", {tensorrt_version, open_tensorrt}},
#endif
    };
    return built_in;
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
        edgehp::require(artifact, EDGEHP_USAGE, "no artifact was named");
        opened = new edgehp_head_pose{edgehp::HeadPose(artifact, threads)};
    });
    return opened;
}

edgehp_status edgehp_infer(edgehp_head_pose* opened, const edgehp_image* image,
                           const edgehp_box* boxes, int count, edgehp_pose* poses) {
    return guarded([&] {
        using edgehp::require;
        require(opened && image && image->data && poses, EDGEHP_USAGE, "a pointer is NULL");
        require(count >= 0 && (boxes || count == 1), EDGEHP_USAGE,
                "without boxes the count of faces is 1");
        const int channels = image->pixels == EDGEHP_GREY ? 1 : 3;
        require(image->width > 0 && image->height > 0 &&
                    image->stride >= static_cast<std::size_t>(image->width) * channels,
                EDGEHP_USAGE, "the image has no pixels, or its stride is less than a row");
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
