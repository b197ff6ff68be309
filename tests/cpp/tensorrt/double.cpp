// TensorRT 10.3.0.30 and CUDA without a GPU, as far as examples/cpp uses them.
//
// A plan is a line of text: "double-engine size=32 min=1 max=4 spread=1 dla=-1". Its angles are the
// means of a crop's three channels, its spreads a tenth of these. Work is done when its stream is
// synchronized, so that what reads too early reads zeros, and all memory is the process's own, so
// that the address sanitizer sees what leaves it. What CUDA and TensorRT forbid fails here: a shape
// changed after its context was captured, a first run inside a capture, a batch outside the profile,
// an engine of a DLA core that was not chosen before, device memory taken for the host's.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "NvInfer.h"

using Work = std::vector<std::function<void()>>;
struct CUstream_st {
    Work queue, captured;
    bool capturing = false;
};
struct CUgraph_st {
    Work work;
};
struct CUgraphExec_st {
    Work work;
};

namespace {

std::map<const void*, bool> memory;  // where it lies -> whether on the GPU

cudaError_t allocate(void** pointer, std::size_t size, bool device) {
    *pointer = std::calloc(1, size);
    memory[*pointer] = device;
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t release(void* pointer) {
    if (pointer && !memory.erase(pointer)) return cudaErrorInvalidValue;
    std::free(pointer);
    return cudaSuccess;
}

cudaError_t put(cudaStream_t stream, std::function<void()> work) {
    (stream->capturing ? stream->captured : stream->queue).push_back(std::move(work));
    return cudaSuccess;
}

struct Plan {
    int size, least, most, spread, dla;
};

class Context final : public nvinfer1::IExecutionContext {
public:
    explicit Context(const Plan& plan) : plan_(plan) {}
    bool setTensorAddress(char const* name, void* data) noexcept override {
        addresses_[name] = data;
        return memory.count(data) && memory[data];
    }
    bool setInputShape(char const* name, nvinfer1::Dims const& shape) noexcept override {
        batch_ = static_cast<int>(shape.d[0]);
        return std::strcmp(name, "crops") == 0 && !captured_ && batch_ >= plan_.least &&
               batch_ <= plan_.most && shape.d[1] == plan_.size && shape.d[3] == 3;
    }
    bool enqueueV3(cudaStream_t stream) noexcept override {
        if (batch_ == 0 || (stream->capturing && !ran_)) return false;
        ran_ = true;
        captured_ = captured_ || stream->capturing;
        const auto* crops = static_cast<const unsigned char*>(addresses_.at("crops"));
        auto* angles = static_cast<float*>(addresses_.at("angles"));
        auto* spread = plan_.spread ? static_cast<float*>(addresses_.at("spread")) : nullptr;
        put(stream, [=, pixels = plan_.size * plan_.size, batch = batch_] {
            for (int i = 0; i < 3 * batch; ++i) {
                double sum = 0;
                for (int k = 0; k < pixels; ++k) sum += crops[(i / 3 * pixels + k) * 3 + i % 3];
                angles[i] = static_cast<float>(sum / pixels / 3);
                if (spread) spread[i] = angles[i] / 10;
            }
        });
        return true;
    }

private:
    Plan plan_;
    std::map<std::string, void*> addresses_;
    int batch_ = 0;
    bool ran_ = false, captured_ = false;
};

class Engine final : public nvinfer1::ICudaEngine {
public:
    explicit Engine(const Plan& plan) : plan_(plan) {}
    nvinfer1::IExecutionContext* createExecutionContext(
        nvinfer1::ExecutionContextAllocationStrategy) noexcept override {
        return new Context(plan_);
    }
    std::int32_t getNbIOTensors() const noexcept override { return 2 + plan_.spread; }
    char const* getIOTensorName(std::int32_t index) const noexcept override {
        static constexpr const char* names[] = {"crops", "angles", "spread"};
        return names[index];
    }
    nvinfer1::Dims getTensorShape(char const*) const noexcept override {
        return shape(plan_.least == plan_.most ? plan_.most : -1);
    }
    nvinfer1::DataType getTensorDataType(char const* name) const noexcept override {
        return std::strcmp(name, "crops") == 0 ? nvinfer1::DataType::kUINT8
                                               : nvinfer1::DataType::kFLOAT;
    }
    nvinfer1::Dims getProfileShape(char const*, std::int32_t,
                                   nvinfer1::OptProfileSelector which) const noexcept override {
        return shape(which == nvinfer1::OptProfileSelector::kMIN ? plan_.least : plan_.most);
    }

private:
    Plan plan_;
    nvinfer1::Dims shape(int batch) const {
        return {4, {batch, plan_.size, plan_.size, 3}};
    }
};

class Runtime final : public nvinfer1::IRuntime {
public:
    explicit Runtime(nvinfer1::ILogger& logger) : logger_(logger) {}
    nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob,
                                                 std::size_t size) noexcept override {
        Plan p{};
        const std::string text(static_cast<const char*>(blob), size);
        const int found = std::sscanf(text.c_str(),
                                      "double-engine size=%d min=%d max=%d spread=%d dla=%d",
                                      &p.size, &p.least, &p.most, &p.spread, &p.dla);
        if (found == 5 && p.dla == dla_ && host_code_) return new Engine(p);
        logger_.log(nvinfer1::ILogger::Severity::kERROR,
                    found == 5 ? "the engine is of another DLA core" : "Magic tag does not match");
        return nullptr;
    }
    void setDLACore(std::int32_t core) noexcept override { dla_ = core; }
    std::int32_t getNbDLACores() const noexcept override { return 2; }
    void setEngineHostCodeAllowed(bool allowed) noexcept override { host_code_ = allowed; }

private:
    nvinfer1::ILogger& logger_;
    int dla_ = -1;
    bool host_code_ = false;
};

}  // namespace

nvinfer1::IRuntime* nvinfer1::createInferRuntime(ILogger& logger) noexcept {
    return new Runtime(logger);
}

std::int32_t getInferLibVersion() noexcept { return 100300; }
extern "C" std::int32_t getInferLibBuildVersion() noexcept { return 30; }

// One GPU, whose name and compute capability the environment says: DOUBLE_GPU="Orin;8;7".
cudaError_t cudaGetDeviceCount(int* count) {
    *count = std::getenv("DOUBLE_GPU") ? 1 : 0;
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    std::sscanf(std::getenv("DOUBLE_GPU"), "%99[^;];%d;%d", properties->name, &properties->major,
                &properties->minor);
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "an error";
}
cudaError_t cudaMallocHost(void** pointer, std::size_t size) {
    return allocate(pointer, size, false);
}
cudaError_t cudaMalloc(void** pointer, std::size_t size) { return allocate(pointer, size, true); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new CUstream_st;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (stream->capturing) return cudaErrorInvalidValue;
    for (const auto& work : stream->queue) work();
    stream->queue.clear();
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    stream->capturing = true;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    stream->capturing = false;
    *graph = new CUgraph_st{std::move(stream->captured)};
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t size,
                            cudaMemcpyKind kind, cudaStream_t stream) {
    const bool up = kind == cudaMemcpyHostToDevice;
    if (!memory.count(target) || !memory.count(source) || memory[target] != up ||
        memory[source] == up)
        return cudaErrorInvalidValue;
    return put(stream, [=] { std::memcpy(target, source, size); });
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long) {
    *executable = new CUgraphExec_st{graph->work};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    for (const auto& work : executable->work) put(stream, work);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}
