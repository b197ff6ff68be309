// OpenVINO on the processor: edgehp/engines/openvino.py in C++, with the same settings.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <sstream>

#include <openvino/openvino.hpp>

#include "edgehp.hpp"

namespace edgehp {
namespace {

std::string last_line(const std::exception& error) {
    std::string last, line;
    for (std::istringstream lines(error.what()); std::getline(lines, line);) {
        const auto first = line.find_first_not_of(" \t\r");
        const auto end = line.find_last_not_of(" \t\r") + 1;
        if (first != line.npos) last = line.substr(first, end - first);
    }
    return last.substr(0, 300);
}

class OpenVino final : public Engine {
public:
    OpenVino(const std::string& path, int threads) : path_(path), threads_(threads) {
        try {
            model_ = core_.read_model(path_);
        } catch (const std::exception& error) {
            throw Error(EDGEHP_DATA, path_ + " cannot be read as an ONNX graph: " +
                                         last_line(error) +
                                         "; it is truncated or damaged: copy or build it again");
        }
        check_graph();
        one_ = compile(1);
    }

    void infer(const std::uint8_t* crops, int count, float* angles, float* spread) override {
        // Compiled for one crop, which is what a car needs, and once more when another number of
        // crops comes first.
        if (count != 1 && !many_) many_ = compile(0);
        ov::InferRequest& request = count == 1 ? one_ : many_;
        const auto n = static_cast<std::size_t>(count), side = static_cast<std::size_t>(size);
        try {
            if (count == 1)
                std::memcpy(request.get_tensor("crops").data<std::uint8_t>(), crops,
                            side * side * 3);
            else
                request.set_tensor("crops", {ov::element::u8, {n, side, side, 3},
                                             const_cast<std::uint8_t*>(crops)});
            request.infer();
            read(request.get_tensor("angles"), n, angles);
            if (has_spread)
                read(request.get_tensor("spread"), n, spread);
            else
                std::fill_n(spread, 3 * n, std::nanf(""));
        } catch (const ov::Exception& error) {
            failed("inference", error);
        }
    }

private:
    std::string path_;
    int threads_;
    ov::Core core_;
    std::shared_ptr<ov::Model> model_;
    ov::InferRequest one_, many_;

    [[noreturn]] static void failed(const std::string& what, const std::exception& error) {
        throw Error(EDGEHP_ENVIRONMENT, "OpenVINO failed at " + what + ": " + last_line(error) +
                                            "; try another OpenVINO release");
    }

    // Find out the input's size and whether there is a spread.
    void check_graph() {
        std::set<std::string> outputs;
        for (const auto& port : model_->outputs())
            outputs.insert(port.get_names().begin(), port.get_names().end());
        const bool one = model_->inputs().size() == 1 && model_->input().get_names().count("crops");
        const auto shape = one ? model_->input().get_partial_shape() : ov::PartialShape();
        if (!one || model_->input().get_element_type() != ov::element::u8 || shape.size() != 4 ||
            shape[1].is_dynamic() || shape[1] != shape[2] || shape[3] != 3 ||
            !outputs.count("angles"))
            throw Error(EDGEHP_DATA, path_ + ": expected one input 'crops' uint8 [N, S, S, 3] and "
                                             "the outputs angles, spread (of bins), found another "
                                             "graph\nhint: build the graph with edgehp");
        size = static_cast<int>(shape[1].get_length());
        has_spread = outputs.count("spread");
    }

    // A request for batches of `count`; 0 leaves the size of the batch free.
    ov::InferRequest compile(int count) {
        ov::AnyMap config{{"PERFORMANCE_HINT", "LATENCY"},
                          // Or a processor with bfloat16 silently computes FP32 layers in it.
                          {"INFERENCE_PRECISION_HINT", "f32"}};
        if (threads_ > 0) config["INFERENCE_NUM_THREADS"] = threads_;
        try {
            const auto model = model_->clone();
            if (count > 0) model->reshape({{"crops", ov::PartialShape{count, size, size, 3}}});
            return core_.compile_model(model, "CPU", config).create_infer_request();
        } catch (const std::exception& error) {
            failed("compiling " + path_.substr(path_.rfind('/') + 1), error);
        }
    }

    void read(const ov::Tensor& tensor, std::size_t count, float* into) const {
        if (tensor.get_shape() != ov::Shape{count, 3})
            throw Error(EDGEHP_DATA, path_ + ": an output has shape " +
                                         tensor.get_shape().to_string() +
                                         ", expected [" + std::to_string(count) +
                                         ", 3]; the file is not a head-pose graph of edgehp: "
                                         "build it again");
        std::copy_n(tensor.data<float>(), 3 * count, into);
    }
};

}  // namespace

std::string openvino_version() {
    // 2026.4.1-22982-e213a147257: the release stands before the first hyphen.
    const std::string whole = ov::get_openvino_version().buildNumber;
    return whole.substr(0, whole.find('-'));
}

std::unique_ptr<Engine> open_openvino(const Artifact& artifact, int threads) {
    return std::make_unique<OpenVino>(artifact.engine_path, threads);
}

}  // namespace edgehp
