// TensorRT 8.6 to 11: edgehp/engines/tensorrt.py in C++, without what only a benchmark needs.
//
// Pinned memory, one stream, and for a single crop a CUDA graph of upload, engine and downloads,
// which saves the processor most of the launching.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "edgehp.hpp"

namespace edgehp {
namespace {

class Logger final : public nvinfer1::ILogger {
public:
    std::string last = "no reason given";
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kERROR) last = text;
    }
};

void check(cudaError_t status, const std::string& what) {
    if (status != cudaSuccess)
        throw Error(EDGEHP_ENVIRONMENT, "CUDA failed to " + what + ": " +
                                            cudaGetErrorString(status));
}

// Memory of an input or output on both sides.
struct Buffer {
    std::string name;
    std::size_t row;  // bytes of one crop
    void *host = nullptr, *device = nullptr;
    Buffer(std::string tensor, std::size_t bytes, int rows) : name(std::move(tensor)), row(bytes) {
        const std::size_t size = row * static_cast<std::size_t>(rows);
        check(cudaMallocHost(&host, size), "allocate pinned memory");
        check(cudaMalloc(&device, size), "allocate memory of the GPU");
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        cudaFreeHost(host);
        cudaFree(device);
    }
};

class TensorRt final : public Engine {
public:
    TensorRt(const std::string& path, std::optional<int> dla_core) : path_(path) {
        std::ifstream file(path, std::ios::binary);
        const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        require(runtime_, "create a runtime");
        if (dla_core) {
            // Before an engine is read, or it cannot use the accelerator.
            require(*dla_core < runtime_->getNbDLACores(),
                    "use DLA core " + std::to_string(*dla_core) + ", which this device lacks");
            runtime_->setDLACore(*dla_core);
        }
        // Of version-compatible engines; the file was checked against its manifest.
        runtime_->setEngineHostCodeAllowed(true);
        engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (!engine_)
            throw Error(EDGEHP_INCOMPATIBLE, path + ": TensorRT refuses the engine: " +
                                                 logger_.last + "; build it again on this device");
        check_tensors();
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "create a stream");
        context_ = new_context();
        if (least_ == 1) capture();
    }

    ~TensorRt() override {
        if (graph_) cudaGraphExecDestroy(graph_);
        if (stream_) cudaStreamDestroy(stream_);
    }

    void infer(const std::uint8_t* crops, int count, float* angles, float* spread) override {
        if (!has_spread) std::fill_n(spread, 3 * count, std::nanf(""));
        const std::size_t crop = buffers_[0]->row;
        for (int done = 0; done < count; done += most_) {
            const int part = std::min(most_, count - done);
            const auto n = static_cast<std::size_t>(part);
            std::memcpy(buffers_[0]->host, crops + crop * static_cast<std::size_t>(done), crop * n);
            if (part == 1 && graph_) {
                check(cudaGraphLaunch(graph_, stream_), "launch the engine's graph");
            } else {
                set_batch(*context_, std::max(part, least_));
                enqueue(*context_, std::max(part, least_));
            }
            check(cudaStreamSynchronize(stream_), "run the engine");
            std::memcpy(angles + 3 * done, buffers_[1]->host, buffers_[1]->row * n);
            if (has_spread)
                std::memcpy(spread + 3 * done, buffers_[2]->host, buffers_[2]->row * n);
        }
    }

private:
    std::string path_;
    Logger logger_;
    // Freed from the last to the first: contexts before their engine, it before its runtime.
    std::vector<std::unique_ptr<Buffer>> buffers_;  // crops, angles, and spread if there is one
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_, captured_;
    cudaStream_t stream_ = nullptr;
    cudaGraphExec_t graph_ = nullptr;
    int least_ = 1, most_ = 1;

    template <typename Found>
    void require(const Found& found, const std::string& what) const {
        if (!found)
            throw Error(EDGEHP_ENVIRONMENT, path_ + ": TensorRT failed to " + what + ": " +
                                                logger_.last);
    }

    // Find out sizes and outputs, and get the memory for them.
    void check_tensors() {
        using nvinfer1::DataType, nvinfer1::OptProfileSelector;
        std::map<std::string, DataType> tensors;
        for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* name = engine_->getIOTensorName(i);
            tensors[name] = engine_->getTensorDataType(name);
        }
        has_spread = tensors.count("spread");
        std::map<std::string, DataType> expected{{"crops", DataType::kUINT8},
                                                 {"angles", DataType::kFLOAT}};
        if (has_spread) expected["spread"] = DataType::kFLOAT;
        const nvinfer1::Dims shape = engine_->getTensorShape("crops");
        if (tensors != expected || shape.nbDims != 4 || shape.d[1] != shape.d[2] ||
            shape.d[1] <= 0 || shape.d[3] != 3)
            throw Error(EDGEHP_DATA, path_ + ": expected one input 'crops' uint8 [N, S, S, 3] and "
                                             "the outputs angles, spread (of bins) float32 [N, 3]\n"
                                             "hint: build the graph with edgehp");
        const auto batch = [&](OptProfileSelector which) {
            return static_cast<int>(shape.d[0] > 0
                                        ? shape.d[0]
                                        : engine_->getProfileShape("crops", 0, which).d[0]);
        };
        size = static_cast<int>(shape.d[1]);
        least_ = batch(OptProfileSelector::kMIN), most_ = batch(OptProfileSelector::kMAX);
        const auto side = static_cast<std::size_t>(size);
        buffers_.push_back(std::make_unique<Buffer>("crops", side * side * 3, most_));
        for (const char* name : {"angles", "spread"})
            if (tensors.count(name))
                buffers_.push_back(std::make_unique<Buffer>(name, 3 * sizeof(float), most_));
    }

    std::unique_ptr<nvinfer1::IExecutionContext> new_context() const {
        std::unique_ptr<nvinfer1::IExecutionContext> made(engine_->createExecutionContext());
        require(made, "create a context");
        for (const auto& buffer : buffers_)
            require(made->setTensorAddress(buffer->name.c_str(), buffer->device), "use the memory");
        return made;
    }

    void set_batch(nvinfer1::IExecutionContext& context, int batch) {
        require(context.setInputShape("crops", nvinfer1::Dims4{batch, size, size, 3}),
                "take a batch of " + std::to_string(batch));
    }

    // Put upload, engine and downloads of a batch into the stream.
    void enqueue(nvinfer1::IExecutionContext& context, int batch) {
        const auto n = static_cast<std::size_t>(batch);
        const Buffer& crops = *buffers_[0];
        check(cudaMemcpyAsync(crops.device, crops.host, crops.row * n, cudaMemcpyHostToDevice,
                              stream_), "upload the crops");
        require(context.enqueueV3(stream_), "run the engine");
        for (std::size_t i = 1; i < buffers_.size(); ++i)
            check(cudaMemcpyAsync(buffers_[i]->host, buffers_[i]->device, buffers_[i]->row * n,
                                  cudaMemcpyDeviceToHost, stream_), "download the answers");
    }

    // A context must not change after its work was captured, so the graph has one of its own.
    void capture() {
        captured_ = new_context();
        set_batch(*captured_, 1);
        enqueue(*captured_, 1);  // TensorRT allocates at the first run: a capture must not hold it
        check(cudaStreamSynchronize(stream_), "run the engine");
        cudaGraph_t graph = nullptr;
        check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture a graph");
        enqueue(*captured_, 1);
        check(cudaStreamEndCapture(stream_, &graph), "capture a graph");
        const cudaError_t status = cudaGraphInstantiateWithFlags(&graph_, graph, 0);
        cudaGraphDestroy(graph);
        check(status, "make a graph");
    }
};

}  // namespace

std::string tensorrt_version() {
    // 8601 is 8.6.1; since 10 it is 101401 for 10.14.1, and the build can be asked for.
    const int version = getInferLibVersion(), step = version < 100000 ? 1000 : 10000;
    std::string text = std::to_string(version / step) + "." +
                       std::to_string(version % step / 100) + "." + std::to_string(version % 100);
#if NV_TENSORRT_MAJOR >= 10
    text += "." + std::to_string(getInferLibBuildVersion());
#endif
    return text;
}

std::vector<Device::Gpu> cuda_gpus() {
    std::vector<Device::Gpu> found;
    int count = 0, major = 0, minor = 0;
    check(cudaGetDeviceCount(&count), "find a GPU");
    for (int i = 0; i < count; ++i) {
        cudaDeviceProp properties{};
        check(cudaGetDeviceProperties(&properties, i), "ask for a GPU's name");
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i), "ask a GPU");
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i), "ask a GPU");
        found.push_back({properties.name, std::to_string(major) + "." + std::to_string(minor)});
    }
    return found;
}

std::unique_ptr<Engine> open_tensorrt(const Artifact& artifact) {
    return std::make_unique<TensorRt>(artifact.engine_path, artifact.dla_core);
}

}  // namespace edgehp
