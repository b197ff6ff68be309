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
    void *host = nullptr, *device = nullptr;
    explicit Buffer(std::size_t size) {
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
    explicit TensorRt(const std::string& path) : path_(path) {
        std::ifstream file(path, std::ios::binary);
        const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        require(runtime_, "create a runtime");
        engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (!engine_)
            throw Error(EDGEHP_INCOMPATIBLE, path + ": TensorRT refuses the engine: " +
                                                 logger_.last + "; build it again on this device");
        const nvinfer1::Dims shape = engine_->getTensorShape("crops");
        if (engine_->getNbIOTensors() != 3 || shape.nbDims != 4 || shape.d[1] != shape.d[2] ||
            shape.d[1] <= 0 || shape.d[3] != 3 ||
            engine_->getTensorDataType("crops") != nvinfer1::DataType::kUINT8 ||
            engine_->getTensorDataType("angles") != nvinfer1::DataType::kFLOAT ||
            engine_->getTensorDataType("spread") != nvinfer1::DataType::kFLOAT)
            throw Error(EDGEHP_DATA, path + ": expected one input 'crops' uint8 [N, S, S, 3] and "
                                            "the outputs angles, spread; build the graph with "
                                            "edgehp");
        size = static_cast<int>(shape.d[1]);
        const auto bound = [&](nvinfer1::OptProfileSelector which) {
            return shape.d[0] > 0 ? static_cast<int>(shape.d[0])
                                  : static_cast<int>(
                                        engine_->getProfileShape("crops", 0, which).d[0]);
        };
        least_ = bound(nvinfer1::OptProfileSelector::kMIN);
        most_ = bound(nvinfer1::OptProfileSelector::kMAX);
        crops_ = std::make_unique<Buffer>(crop_bytes() * most_);
        for (auto& answer : answers_)
            answer = std::make_unique<Buffer>(sizeof(float) * 3 * static_cast<std::size_t>(most_));
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "create a stream");
        context_.reset(engine_->createExecutionContext());
        require(context_, "create a context");
        bind(*context_);
        if (least_ == 1) capture();
    }

    ~TensorRt() override {
        if (graph_) cudaGraphExecDestroy(graph_);
        if (stream_) cudaStreamDestroy(stream_);
    }

    void infer(const std::uint8_t* crops, int count, float* angles, float* spread) override {
        for (int done = 0; done < count; done += most_) {
            const int part = std::min(most_, count - done);
            std::memcpy(crops_->host, crops + crop_bytes() * done, crop_bytes() * part);
            if (part == 1 && graph_)
                check(cudaGraphLaunch(graph_, stream_), "launch the engine's graph");
            else
                put(*context_, std::max(part, least_));
            check(cudaStreamSynchronize(stream_), "run the engine");
            const std::size_t bytes = sizeof(float) * 3 * static_cast<std::size_t>(part);
            std::memcpy(angles + 3 * done, answers_[0]->host, bytes);
            std::memcpy(spread + 3 * done, answers_[1]->host, bytes);
        }
    }

private:
    std::string path_;
    Logger logger_;
    // Freed from the last to the first: contexts before their engine, it before its runtime.
    std::unique_ptr<Buffer> crops_, answers_[2];
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_, captured_;
    cudaStream_t stream_ = nullptr;
    cudaGraphExec_t graph_ = nullptr;
    int least_ = 1, most_ = 1;

    std::size_t crop_bytes() const { return static_cast<std::size_t>(size) * size * 3; }

    template <typename Found>
    void require(const Found& found, const std::string& what) const {
        if (!found)
            throw Error(EDGEHP_ENVIRONMENT, path_ + ": TensorRT failed to " + what + ": " +
                                                logger_.last);
    }

    void bind(nvinfer1::IExecutionContext& context) {
        require(context.setTensorAddress("crops", crops_->device) &&
                    context.setTensorAddress("angles", answers_[0]->device) &&
                    context.setTensorAddress("spread", answers_[1]->device),
                "use the memory");
    }

    // Put upload, engine and downloads of a batch into the stream.
    void put(nvinfer1::IExecutionContext& context, int batch) {
        require(context.setInputShape("crops", nvinfer1::Dims4{batch, size, size, 3}),
                "take a batch of " + std::to_string(batch));
        enqueue(context, batch);
    }

    void enqueue(nvinfer1::IExecutionContext& context, int batch) {
        check(cudaMemcpyAsync(crops_->device, crops_->host, crop_bytes() * batch,
                              cudaMemcpyHostToDevice, stream_), "upload the crops");
        require(context.enqueueV3(stream_), "run the engine");
        for (const auto& answer : answers_)
            check(cudaMemcpyAsync(answer->host, answer->device,
                                  sizeof(float) * 3 * static_cast<std::size_t>(batch),
                                  cudaMemcpyDeviceToHost, stream_), "download the answers");
    }

    // A context must not change after its work was captured, so the graph has one of its own.
    void capture() {
        captured_.reset(engine_->createExecutionContext());
        require(captured_, "create a context");
        bind(*captured_);
        put(*captured_, 1);  // TensorRT allocates at the first run, which a capture must not hold
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

std::unique_ptr<Engine> open_tensorrt(const std::string& path) {
    return std::make_unique<TensorRt>(path);
}

}  // namespace edgehp
