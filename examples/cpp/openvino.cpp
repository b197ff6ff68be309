// OpenVINO on the processor: edgehp/engines/openvino.py in C++, with the same settings.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <sstream>

#include <openvino/openvino.hpp>

#include "edgehp.hpp"

namespace edgehp {
namespace {

std::string last_line(const std::exception& error) {
    std::string last, line;
    for (std::istringstream lines(error.what()); std::getline(lines, line);) {
        const auto first = line.find_first_not_of(" \t\r");
        if (first != line.npos) last = line.substr(first, line.find_last_not_of(" \t\r") - first + 1);
    }
    return last.substr(0, 300);
}

[[noreturn]] void failed(const std::string& what, const std::exception& error) {
    throw Error(EDGEHP_ENVIRONMENT, "OpenVINO failed at " + what + ": " + last_line(error) +
                                        "; try another OpenVINO release");
}

class OpenVino final : public Engine {
public:
    OpenVino(const std::string& path, int threads) : path_(path), threads_(threads) {
        if (std::filesystem::file_size(path) == 0)
            throw Error(EDGEHP_DATA, path + " has 0 bytes; expected an ONNX graph of at most "
                                            "2147483648 bytes");
        try {
            model_ = core_.read_model(path);
        } catch (const std::exception& error) {
            throw Error(EDGEHP_DATA, path + " cannot be read as an ONNX graph: " +
                                         last_line(error) +
                                         "; it is truncated or damaged: copy or build it again");
        }
        size = input_size();
        one_ = compile(1);
    }

    void infer(const std::uint8_t* crops, int count, float* angles, float* spread) override {
        // Compiled for one crop, which is what a car needs, and once more when another number of
        // crops comes first.
        if (count != 1 && !many_) many_ = compile(0);
        ov::InferRequest& request = count == 1 ? one_ : many_;
        const auto side = static_cast<std::size_t>(size);
        const ov::Shape shape{static_cast<std::size_t>(count), side, side, 3};
        try {
            if (count == 1)
                std::memcpy(request.get_tensor("crops").data<std::uint8_t>(), crops,
                            ov::shape_size(shape));
            else
                request.set_tensor("crops", ov::Tensor(ov::element::u8, shape,
                                                       const_cast<std::uint8_t*>(crops)));
            request.infer();
            read(request, "angles", count, angles);
            read(request, "spread", count, spread);
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

    int input_size() const {
        std::string found, outputs;
        bool right = model_->inputs().size() == 1;
        int side = 0;
        for (const auto& input : model_->inputs()) {
            const ov::PartialShape shape = input.get_partial_shape();
            const std::string name = input.get_any_name();
            const std::string type = input.get_element_type().get_type_name();
            std::string sizes;
            for (const ov::Dimension& dimension : shape)
                sizes += (sizes.empty() ? "" : ", ") +
                         (dimension.is_dynamic() ? "None" : std::to_string(dimension.get_length()));
            found += (found.empty() ? "" : ", ") + name + ": " + type + " [" + sizes + "]";
            right = right && name == "crops" && type == "u8" && shape.size() == 4 &&
                    shape[1].is_static() && shape[1] == shape[2] && shape[3] == 3;
            if (right) side = static_cast<int>(shape[1].get_length());
        }
        bool angles = false, spread = false;
        for (const auto& output : model_->outputs())
            for (const std::string& name : output.get_names()) {
                outputs += (outputs.empty() ? "" : ", ") + name;
                angles = angles || name == "angles";
                spread = spread || name == "spread";
            }
        if (!right || side <= 0 || !angles || !spread)
            throw Error(EDGEHP_DATA, path_ + ": expected one input 'crops' uint8 [N, S, S, 3] and "
                                             "the outputs angles, spread; found " +
                                         (found.empty() ? "no input" : found) + " and " + outputs +
                                         "; build the graph with edgehp");
        return side;
    }

    // A request for batches of `count`; 0 leaves the size of the batch free.
    ov::InferRequest compile(int count) {
        ov::AnyMap config{{"PERFORMANCE_HINT", "LATENCY"},
                          // Or a processor with bfloat16 silently computes FP32 layers in it.
                          {"INFERENCE_PRECISION_HINT", "f32"}};
        if (threads_ > 0) config["INFERENCE_NUM_THREADS"] = threads_;
        try {
            auto model = model_->clone();
            if (count > 0) model->reshape({{"crops", ov::PartialShape{count, size, size, 3}}});
            return core_.compile_model(model, "CPU", config).create_infer_request();
        } catch (const std::exception& error) {
            failed("compiling " + path_.substr(path_.rfind('/') + 1), error);
        }
    }

    void read(ov::InferRequest& request, const std::string& name, int count, float* into) const {
        const ov::Tensor tensor = request.get_tensor(name);
        const ov::Shape shape = tensor.get_shape();
        if (shape != ov::Shape{static_cast<std::size_t>(count), 3}) {
            std::string text;
            for (const std::size_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
            throw Error(EDGEHP_DATA, path_ + ": output '" + name + "' has shape [" + text +
                                         "], expected [" + std::to_string(count) +
                                         ", 3]; the file is not a head-pose graph of edgehp: "
                                         "build it again");
        }
        const float* data = tensor.data<float>();
        std::copy(data, data + tensor.get_size(), into);
    }
};

}  // namespace

std::string openvino_version() {
    // 2026.4.1-22982-e213a147257: the release stands before the first hyphen.
    const std::string whole = ov::get_openvino_version().buildNumber;
    return whole.substr(0, whole.find('-'));
}

std::unique_ptr<Engine> open_openvino(const std::string& path, int threads) {
    return std::make_unique<OpenVino>(path, threads);
}

}  // namespace edgehp
