// TensorRT 8.6 to 11: edgehp/engines/tensorrt.py in C++, without what only a benchmark needs.
//
// Pinned memory, one stream, and for a single crop a CUDA graph of upload, engine and downloads,
// which saves the processor most of the launching.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "edgehp.hpp"

// Exported by TensorRT 10 and later, but not declared by the headers of all of them.
extern "C" std::int32_t getInferLibBuildVersion() noexcept __attribute__((weak));

namespace edgehp {
namespace {

using nvinfer1::DataType;
using nvinfer1::IExecutionContext;
using nvinfer1::OptProfileSelector;

class Logger final : public nvinfer1::ILogger {
public:
    std::string last = "no reason given";
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kERROR) last = text;
    }
};

void check(cudaError_t status, const char* what) {
    require(status == cudaSuccess, EDGEHP_ENVIRONMENT, "CUDA failed to ", what, ": ",
            cudaGetErrorString(status));
}

// Memory of an input or output on both sides.
struct Buffer {
    std::string name;
    std::size_t row;  // bytes of one crop
    void *host = nullptr, *device = nullptr;
    Buffer(const char* tensor, std::size_t bytes, std::size_t rows) : name(tensor), row(bytes) {
        check(cudaMallocHost(&host, row * rows), "allocate pinned memory");
        check(cudaMalloc(&device, row * rows), "allocate memory of the GPU");
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
    explicit TensorRt(const Artifact& artifact) : path_(artifact.engine_path) {
        std::ifstream file(path_, std::ios::binary);
        const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        need(runtime_ != nullptr, "create a runtime");
        if (const auto core = artifact.dla_core) {
            // Before an engine is read, or it cannot use the accelerator.
            need(*core < runtime_->getNbDLACores(), "use DLA core ", *core,
                 ", which this device lacks");
            runtime_->setDLACore(*core);
        }
        // Of version-compatible engines; the file was checked against its manifest.
        runtime_->setEngineHostCodeAllowed(true);
        engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        require(engine_ != nullptr, EDGEHP_INCOMPATIBLE, path_, ": TensorRT refuses the engine: ",
                logger_.last, "; build it again on this device");
        std::map<std::string, DataType> tensors, expected{{"crops", DataType::kUINT8},
                                                          {"angles", DataType::kFLOAT}};
        for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* name = engine_->getIOTensorName(i);
            tensors[name] = engine_->getTensorDataType(name);
        }
        has_spread = tensors.count("spread");
        if (has_spread) expected["spread"] = DataType::kFLOAT;
        shape_ = engine_->getTensorShape("crops");
        fits = tensors == expected && shape_.nbDims == 4 && shape_.d[1] == artifact.size &&
               shape_.d[2] == artifact.size && shape_.d[3] == 3;
        if (fits) prepare();
    }

    ~TensorRt() override {
        if (graph_) cudaGraphExecDestroy(graph_);
        if (stream_) cudaStreamDestroy(stream_);
    }

    void infer(const std::uint8_t* crops, int count, float* angles, float* spread) override {
        float* const answers[] = {angles, spread};
        for (int done = 0; done < count; done += most_) {
            const int part = std::min(most_, count - done);
            const auto n = static_cast<std::size_t>(part), first = static_cast<std::size_t>(done);
            const Buffer& input = *buffers_[0];
            std::memcpy(input.host, crops + input.row * first, input.row * n);
            if (part == 1 && graph_)
                check(cudaGraphLaunch(graph_, stream_), "launch the engine's graph");
            else
                enqueue(*context_, std::max(part, least_));
            check(cudaStreamSynchronize(stream_), "run the engine");
            for (std::size_t i = 1; i < buffers_.size(); ++i)
                std::memcpy(answers[i - 1] + 3 * first, buffers_[i]->host, buffers_[i]->row * n);
        }
    }

private:
    std::string path_;
    Logger logger_;
    // Freed from the last to the first: contexts before their engine, it before its runtime.
    std::vector<std::unique_ptr<Buffer>> buffers_;  // crops, angles, and spread if there is one
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<IExecutionContext> context_, captured_;
    cudaStream_t stream_ = nullptr;
    cudaGraphExec_t graph_ = nullptr;
    nvinfer1::Dims shape_{};
    int least_ = 1, most_ = 1;

    template <typename... Parts>
    void need(bool done, const Parts&... what) const {
        require(done, EDGEHP_ENVIRONMENT, path_, ": TensorRT failed to ", what..., ": ",
                logger_.last);
    }

    void prepare() {
        const auto batch = [&](OptProfileSelector which) {
            return static_cast<int>(shape_.d[0] > 0
                                        ? shape_.d[0]
                                        : engine_->getProfileShape("crops", 0, which).d[0]);
        };
        least_ = batch(OptProfileSelector::kMIN), most_ = batch(OptProfileSelector::kMAX);
        const auto side = static_cast<std::size_t>(shape_.d[1]);
        for (const char* name : {"crops", "angles", "spread"})
            if (has_spread || name != std::string("spread"))
                buffers_.push_back(std::make_unique<Buffer>(
                    name, buffers_.empty() ? side * side * 3 : 3 * sizeof(float), most_));
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "create a stream");
        context_ = new_context();
        if (least_ == 1) capture();
    }

    std::unique_ptr<IExecutionContext> new_context() const {
        std::unique_ptr<IExecutionContext> made(engine_->createExecutionContext());
        need(made != nullptr, "create a context");
        for (const auto& buffer : buffers_)
            need(made->setTensorAddress(buffer->name.c_str(), buffer->device), "use the memory");
        return made;
    }

    // Put upload, engine and downloads of a batch into the stream.
    void enqueue(IExecutionContext& context, int batch, bool new_shape = true) {
        const auto n = static_cast<std::size_t>(batch);
        if (new_shape) {
            shape_.d[0] = batch;
            need(context.setInputShape("crops", shape_), "take a batch of ", batch);
        }
        const Buffer& crops = *buffers_[0];
        check(cudaMemcpyAsync(crops.device, crops.host, crops.row * n, cudaMemcpyHostToDevice,
                              stream_), "upload the crops");
        need(context.enqueueV3(stream_), "run the engine");
        for (std::size_t i = 1; i < buffers_.size(); ++i)
            check(cudaMemcpyAsync(buffers_[i]->host, buffers_[i]->device, buffers_[i]->row * n,
                                  cudaMemcpyDeviceToHost, stream_), "download the answers");
    }

    // A context must not change after its work was captured, so the graph has one of its own.
    void capture() {
        captured_ = new_context();
        enqueue(*captured_, 1);  // TensorRT allocates at the first run: a capture must not hold it
        check(cudaStreamSynchronize(stream_), "run the engine");
        cudaGraph_t graph = nullptr;
        check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture a graph");
        enqueue(*captured_, 1, false);
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
    return std::to_string(version / step) + "." + std::to_string(version % step / 100) + "." +
           std::to_string(version % 100) +
           (getInferLibBuildVersion ? "." + std::to_string(getInferLibBuildVersion()) : "");
}

std::vector<std::pair<std::string, std::string>> cuda_gpus() {
    std::vector<std::pair<std::string, std::string>> found;
    int count = 0;
    check(cudaGetDeviceCount(&count), "find a GPU");
    for (int i = 0; i < count; ++i) {
        cudaDeviceProp p{};
        check(cudaGetDeviceProperties(&p, i), "ask for a GPU's name");
        found.push_back({p.name, std::to_string(p.major) + "." + std::to_string(p.minor)});
    }
    return found;
}

std::unique_ptr<Engine> open_tensorrt(const Artifact& artifact, int) {
    return std::make_unique<TensorRt>(artifact);
}

}  // namespace edgehp
