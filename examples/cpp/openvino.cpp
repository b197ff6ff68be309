// OpenVINO on the processor: edgehp/engines/openvino.py in C++, with the same settings.
#include <algorithm>
#include <set>

#include <openvino/openvino.hpp>

#include "edgehp.hpp"

namespace edgehp {
namespace {

std::string last_line(const std::exception& error) {
    std::string text = error.what();
    text.erase(text.find_last_not_of(" \t\r\n") + 1);
    text.erase(0, text.rfind('\n') + 1);
    text.erase(0, text.find_first_not_of(" \t\r"));
    return text.substr(0, 300);
}

class OpenVino final : public Engine {
public:
    OpenVino(const Artifact& artifact, int threads) : size_(artifact.size), threads_(threads) {
        try {
            model_ = core_.read_model(artifact.engine_path);
        } catch (const std::exception& error) {
            require(false, EDGEHP_DATA, artifact.engine_path, " cannot be read as an ONNX graph: ",
                    last_line(error), "; it is truncated or damaged: copy or build it again");
        }
        std::set<std::string> found;  // names and types of its inputs and outputs
        for (const auto& ports : {model_->inputs(), model_->outputs()})
            for (const auto& port : ports)
                found.insert(port.get_any_name() + " " + port.get_element_type().to_string());
        std::set<std::string> expected{"crops u8", "angles f32"};
        has_spread = found.count("spread f32");
        if (has_spread) expected.insert("spread f32");
        fits = found == expected && model_->inputs().size() == 1 &&
               model_->input().get_partial_shape().compatible({-1, size_, size_, 3});
        if (fits) one_ = compile(1);
    }

    void infer(const std::uint8_t* crops, int count, float* angles, float* spread) override {
        // Compiled for one crop, which is what a car needs, and once more when another number of
        // crops comes first.
        if (count != 1 && !many_) many_ = compile(-1);
        ov::InferRequest& request = count == 1 ? one_ : many_;
        const auto n = static_cast<std::size_t>(count), side = static_cast<std::size_t>(size_);
        try {
            request.set_tensor("crops", {ov::element::u8, {n, side, side, 3},
                                         const_cast<std::uint8_t*>(crops)});
            request.infer();
            read(request.get_tensor("angles"), 3 * n, angles);
            if (has_spread) read(request.get_tensor("spread"), 3 * n, spread);
        } catch (const ov::Exception& error) {
            failed("inference", error);
        }
    }

private:
    int size_, threads_;
    ov::Core core_;
    std::shared_ptr<ov::Model> model_;
    ov::InferRequest one_, many_;

    [[noreturn]] static void failed(const std::string& what, const std::exception& error) {
        throw Error(EDGEHP_ENVIRONMENT, "OpenVINO failed at " + what + ": " + last_line(error) +
                                            "; try another OpenVINO release");
    }

    static void read(const ov::Tensor& tensor, std::size_t size, float* into) {
        require(tensor.get_size() == size, EDGEHP_DATA, "an output has shape ",
                tensor.get_shape(), ", expected [N, 3]: build the artifact again");
        std::copy_n(tensor.data<float>(), size, into);
    }

    // A request for batches of `count`; -1 leaves the size of the batch free.
    ov::InferRequest compile(int count) {
        ov::AnyMap config{{"PERFORMANCE_HINT", "LATENCY"},
                          // Or a processor with bfloat16 silently computes FP32 layers in it.
                          {"INFERENCE_PRECISION_HINT", "f32"}};
        if (threads_ > 0) config["INFERENCE_NUM_THREADS"] = threads_;
        try {
            const auto model = model_->clone();
            model->reshape({{"crops", ov::PartialShape{count, size_, size_, 3}}});
            return core_.compile_model(model, "CPU", config).create_infer_request();
        } catch (const std::exception& error) {
            failed("compiling the engine", error);
        }
    }
};

}  // namespace

std::string openvino_version() {
    // 2026.4.1-22982-e213a147257: the release stands before the first hyphen.
    const std::string whole = ov::get_openvino_version().buildNumber;
    return whole.substr(0, whole.find('-'));
}

std::unique_ptr<Engine> open_openvino(const Artifact& artifact, int threads) {
    return std::make_unique<OpenVino>(artifact, threads);
}

}  // namespace edgehp
