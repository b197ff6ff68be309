/* A driver without a GPU: libcuda.so.1 as far as edgehp and its CUDA packages use it.
 *
 * Device memory lies on the host under addresses of its own (TAG), so that a host pointer given to
 * the GPU is found out. A stream executes at synchronization what was put into it, in order. Time
 * is a clock that operations advance, so that every measured time is known.
 *
 * Environment: DOUBLE_VERSION (12060), DOUBLE_DEVICES ("name;major;minor;integrated|...").
 * Control (for tests, by ctypes): double_fail, double_fault, double_live, double_abandoned.
 */
#define _GNU_SOURCE
#include "crop_kernel.c"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
typedef struct Context { int refs, flags, sticky; u64 generation; } Context;
typedef struct Event { int recorded, done, captured; double us; struct Stream *stream; u64 op; } Event;
enum { COPY, FILL, RECORD, HEAD, CROP };
typedef struct Op {
    int kind, value, batch, side;
    u64 target, source, third, size;
    Event *event;
} Op;
typedef struct Ops { Op *list; u64 count, room; } Ops;
typedef struct Stream { Ops queue; Ops *capture; int broken; pthread_t owner; } Stream;
typedef struct Block { u64 address, size; void *memory; int host; struct Block *next; } Block;

enum {
    INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, BAD_DEVICE = 101,
    INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
    ILLEGAL_ADDRESS = 700, CONTEXT_DESTROYED = 709, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903, CAPTURED_EVENT = 907
};
#define TAG (1ull << 52)
#define DEVICES 8
#define DEPTH 64

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_key_t stack_key;
static int ready, version = 13000, count, abandoned;
static long live;
static double clock_us = 1000;
static char names[DEVICES][100];
static int major[DEVICES], minor[DEVICES], integrated[DEVICES];
static Context primary[DEVICES];
static Block *blocks;
static char fail_name[64];
static int fail_status, fail_after, fault;
typedef struct Stack { int depth; Context *items[DEPTH]; } Stack;

static void thread_ended(void *value) {
    if (((Stack *)value)->depth) abandoned++;
    free(value);
}

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv("DOUBLE_VERSION"), *devices = getenv("DOUBLE_DEVICES");
    char copy[800], *rest = copy, *one;
    pthread_key_create(&stack_key, thread_ended);
    if (text) version = atoi(text);
    snprintf(copy, sizeof copy, "%s", devices ? devices : "Double GPU;8;9;0");
    while ((one = strsep(&rest, "|")) && count < DEVICES && *one) {
        sscanf(one, "%99[^;];%d;%d;%d", names[count], &major[count], &minor[count],
               &integrated[count]);
        count++;
    }
}

static Stack *stack(void) {
    Stack *found = pthread_getspecific(stack_key);
    if (!found) pthread_setspecific(stack_key, found = calloc(1, sizeof *found));
    return found;
}

/* What a call answers before it does anything: an error asked for, or no usable context. */
static int entered(const char *name, int needs_context) {
    Stack *own = stack();
    Context *top = own->depth ? own->items[own->depth - 1] : NULL;
    if (fail_status && !strcmp(name, fail_name) && fail_after-- <= 0) {
        int status = fail_status;
        fail_status = 0;
        return status;
    }
    if (!ready) return NOT_INITIALIZED;
    if (!needs_context) return 0;
    if (!top) return INVALID_CONTEXT;
    if (top->sticky) return top->sticky;
    return top->refs ? 0 : CONTEXT_DESTROYED;
}
#define CALL(name, ...) \
    int name(__VA_ARGS__) { \
        int status; \
        pthread_mutex_lock(&lock); \
        if ((status = entered(#name, NEEDS))) goto end;
#define END end: pthread_mutex_unlock(&lock); return status; }
#define GIVE(value) do { status = (value); goto end; } while (0)

static Context *current(void) { return stack()->items[stack()->depth - 1]; }

static Block *block_of(u64 address, u64 size, int host) {
    for (Block *b = blocks; b; b = b->next) {
        if (b->host == host && address >= b->address && address + size <= b->address + b->size)
            return b;
        /* The GPU's name of mapped host memory. */
        if (!host && b->host && address >= (b->address | TAG)
            && address + size <= (b->address | TAG) + b->size)
            return b;
    }
    return NULL;
}

static void *seen_by_gpu(u64 address, u64 size) {
    return address & TAG && block_of(address, size, 0) ? (void *)(address & ~TAG) : NULL;
}

/* Any address of a copy; the host's side need not be page-locked. */
static void *copied(u64 address, u64 size) {
    return address & TAG ? seen_by_gpu(address, size) : (void *)address;
}

static void put(Ops *ops, Op op) {
    if (ops->count == ops->room)
        ops->list = realloc(ops->list, (ops->room = ops->room * 2 + 8) * sizeof op);
    ops->list[ops->count++] = op;
}

static int enqueue(Stream *stream, Op op) {
    if (!stream) return INVALID_HANDLE;
    if (stream->broken) return CAPTURE_INVALIDATED;
    put(stream->capture ? stream->capture : &stream->queue, op);
    return 0;
}

/* The network of the TensorRT double: the mean of each channel, and that plus the batch. */
static int head(Op *op) {
    u64 pixels = (u64)op->side * op->side;
    unsigned char *crops = seen_by_gpu(op->target, op->batch * pixels * 3);
    float *angles = seen_by_gpu(op->source, op->batch * 12ull);
    float *spread = seen_by_gpu(op->third, op->batch * 12ull);
    if (!crops || !angles || !spread || fault) return fault ? fault : ILLEGAL_ADDRESS;
    for (int i = 0; i < op->batch * 3; i++) {
        unsigned char *first = crops + (i / 3) * pixels * 3 + i % 3;
        double sum = 0;
        for (u64 p = 0; p < pixels; p++) sum += first[p * 3];
        angles[i] = (float)(sum / pixels);
        spread[i] = angles[i] + op->batch;
    }
    return 0;
}

/* The kernel of edgehp.engines.gpu_crop, which is plain C, with its addresses looked at. */
static int crop(Op *op) {
    u64 pixels = (u64)op->side * op->side * 3;
    unsigned char *buffer = seen_by_gpu(op->target, op->batch * sizeof(Cut));
    unsigned char *crops = seen_by_gpu(op->source, op->batch * pixels);
    if (!buffer || !crops || fault) return fault ? fault : ILLEGAL_ADDRESS;
    for (int i = 0; i < op->batch; i++) {
        const Cut *cut = (const Cut *)buffer + i;
        u64 end = cut->pixels + (u64)cut->pitch * (cut->bottom + 1);
        if (cut->form == NV12) end = cut->chroma + (u64)cut->pitch * (cut->bottom + 1) / 2;
        if (!seen_by_gpu(op->target, end)) return ILLEGAL_ADDRESS;
    }
    edgehp_crop(buffer, crops, op->side, op->batch);
    return 0;
}

static int execute(Stream *stream, u64 until) {
    Context *context = current();
    u64 done = 0;
    for (; done < stream->queue.count && done < until && !context->sticky; done++) {
        Op *op = &stream->queue.list[done];
        if (op->kind == RECORD) {
            op->event->us = clock_us;
            op->event->done = 1;
        } else if (op->kind == HEAD) {
            clock_us += 1000.0 * op->batch;
            context->sticky = head(op);
        } else if (op->kind == CROP) {
            clock_us += 50.0 * op->batch;
            context->sticky = crop(op);
        } else {
            void *target = copied(op->target, op->size), *source = copied(op->source, op->size);
            clock_us += op->kind == FILL ? 10 : (op->target & TAG) ? 250 : 125;
            if (!target || (op->kind == COPY && !source)) context->sticky = ILLEGAL_ADDRESS;
            else if (op->kind == FILL) memset(target, op->value, op->size);
            else memcpy(target, source, op->size);
        }
    }
    stream->queue.count -= done;
    memmove(stream->queue.list, stream->queue.list + done, stream->queue.count * sizeof(Op));
    return context->sticky;
}

#define NEEDS 0
int cuInit(unsigned flags) { (void)flags; ready = count > 0; return count ? 0 : NO_DEVICE; }
int cuDriverGetVersion(int *out) { *out = version; return 0; }
CALL(cuDeviceGetCount, int *out) *out = count; END
CALL(cuDeviceGet, int *out, int index)
    if (index < 0 || index >= count) GIVE(BAD_DEVICE);
    *out = index; END
CALL(cuDeviceGetName, char *out, int size, int device) snprintf(out, size, "%s", names[device]); END
CALL(cuDeviceTotalMem_v2, u64 *out, int device) (void)device; *out = 8ull << 30; END
CALL(cuDeviceGetAttribute, int *out, int which, int device)
    *out = which == 75 ? major[device] : which == 76 ? minor[device]
         : which == 18 ? integrated[device] : which == 19 || which == 41 ? 1 : 0; END
CALL(cuDevicePrimaryCtxRetain, Context **out, int device)
    *out = &primary[device]; primary[device].refs++; END
CALL(cuDevicePrimaryCtxRelease_v2, int device)
    if (!primary[device].refs) GIVE(INVALID_CONTEXT);
    primary[device].refs--; END
CALL(cuDevicePrimaryCtxSetFlags_v2, int device, unsigned flags) primary[device].flags = flags; END
CALL(cuDevicePrimaryCtxGetState, int device, unsigned *flags, int *active)
    *flags = primary[device].flags; *active = primary[device].refs > 0; END
CALL(cuCtxPushCurrent_v2, Context *context)
    if (!context || stack()->depth == DEPTH) GIVE(INVALID_CONTEXT);
    if (!context->refs) GIVE(CONTEXT_DESTROYED);
    stack()->items[stack()->depth++] = context; END
CALL(cuCtxPopCurrent_v2, Context **out)
    if (!stack()->depth) GIVE(INVALID_CONTEXT);
    *out = stack()->items[--stack()->depth]; END
CALL(cuCtxSetCurrent, Context *context)
    if (stack()->depth) stack()->depth--;
    if (context) stack()->items[stack()->depth++] = context; END
CALL(cuCtxGetCurrent, Context **out) *out = stack()->depth ? current() : NULL; END
#undef NEEDS
#define NEEDS 1
CALL(cuCtxGetDevice, int *out) *out = (int)(current() - primary); END
CALL(cuCtxSynchronize, void) END
CALL(cuCtxGetApiVersion, Context *context, unsigned *out) (void)context; *out = 3020; END
CALL(cuMemGetInfo_v2, u64 *free_, u64 *total) *free_ = 6ull << 30; *total = 8ull << 30; END

static int allocate(u64 *out, u64 size, int host) {
    Block *b = malloc(sizeof *b);
    if (!size) return INVALID_VALUE;
    b->memory = malloc(size);
    memset(b->memory, 0xCD, size);
    *b = (Block){(u64)b->memory | (host ? 0 : TAG), size, b->memory, host, blocks};
    blocks = b;
    live++;
    *out = b->address;
    return 0;
}
static int release(u64 address) {
    for (Block **at = &blocks; *at; at = &(*at)->next)
        if ((*at)->address == address) {
            Block *b = *at;
            *at = b->next;
            memset(b->memory, 0xDD, b->size);
            free(b->memory);
            free(b);
            live--;
            return 0;
        }
    return INVALID_VALUE;
}
CALL(cuMemAlloc_v2, u64 *out, u64 size) status = allocate(out, size, 0); END
CALL(cuMemFree_v2, u64 address) status = address & TAG ? release(address) : INVALID_VALUE; END
CALL(cuMemHostAlloc, void **out, u64 size, unsigned flags)
    (void)flags; status = allocate((u64 *)out, size, 1); END
CALL(cuMemAllocHost_v2, void **out, u64 size) status = allocate((u64 *)out, size, 1); END
CALL(cuMemFreeHost, void *memory) status = release((u64)memory); END
CALL(cuMemHostGetDevicePointer_v2, u64 *out, void *memory, unsigned flags)
    (void)flags;
    if (!block_of((u64)memory, 1, 1)) GIVE(INVALID_VALUE);
    *out = (u64)memory | TAG; END
CALL(cuMemcpyHtoDAsync_v2, u64 target, const void *source, u64 size, Stream *stream)
    if (!seen_by_gpu(target, size) || (u64)source & TAG) GIVE(INVALID_VALUE);
    status = enqueue(stream, (Op){.kind = COPY, .target = target, .source = (u64)source,
                                  .size = size}); END
CALL(cuMemcpyDtoHAsync_v2, void *target, u64 source, u64 size, Stream *stream)
    if (!seen_by_gpu(source, size) || (u64)target & TAG) GIVE(INVALID_VALUE);
    status = enqueue(stream, (Op){.kind = COPY, .target = (u64)target, .source = source,
                                  .size = size}); END
CALL(cuMemsetD8Async, u64 target, unsigned char value, u64 size, Stream *stream)
    if (!seen_by_gpu(target, size)) GIVE(INVALID_VALUE);
    status = enqueue(stream, (Op){.kind = FILL, .target = target, .value = value, .size = size});
    END
CALL(cuStreamCreate, Stream **out, unsigned flags)
    if (flags != 1) GIVE(INVALID_VALUE); /* a blocking stream would wait for other people's work */
    *out = calloc(1, sizeof **out); live++; END
CALL(cuStreamDestroy_v2, Stream *stream) free(stream->queue.list); free(stream); live--; END
CALL(cuStreamSynchronize, Stream *stream)
    if (stream->capture) { stream->broken = 1; GIVE(CAPTURE_UNSUPPORTED); }
    status = execute(stream, ~0ull); END
CALL(cuStreamQuery, Stream *stream) status = stream->queue.count ? NOT_READY : 0; END
CALL(cuStreamBeginCapture_v2, Stream *stream, int mode)
    (void)mode;
    if (stream->capture) GIVE(INVALID_VALUE);
    stream->capture = calloc(1, sizeof(Ops)); live++; END
CALL(cuStreamIsCapturing, Stream *stream, int *out)
    *out = !stream->capture ? 0 : stream->broken ? 2 : 1; END
CALL(cuStreamEndCapture, Stream *stream, Ops **out)
    if (!stream->capture) GIVE(CAPTURE_UNMATCHED);
    *out = stream->capture;
    stream->capture = NULL;
    if (stream->broken) { stream->broken = 0; live--; *out = NULL; GIVE(CAPTURE_INVALIDATED); } END
CALL(cuGraphInstantiateWithFlags, Ops **out, Ops *graph, u64 flags)
    (void)flags;
    *out = calloc(1, sizeof **out); live++;
    for (u64 i = 0; i < graph->count; i++) put(*out, graph->list[i]); END
CALL(cuGraphDestroy, Ops *graph) free(graph->list); free(graph); live--; END
CALL(cuGraphExecDestroy, Ops *graph) free(graph->list); free(graph); live--; END
CALL(cuGraphLaunch, Ops *graph, Stream *stream)
    for (u64 i = 0; i < graph->count && !status; i++) {
        Op op = graph->list[i];
        if (op.kind == RECORD) {
            op.event->recorded = 1; op.event->done = 0; op.event->stream = stream;
            op.event->captured = 0;
        }
        status = enqueue(stream, op);
    } END
CALL(cuEventCreate, Event **out, unsigned flags)
    (void)flags; *out = calloc(1, sizeof **out); live++; END
CALL(cuEventDestroy_v2, Event *event) free(event); live--; END

static int record(Event *event, Stream *stream, int external) {
    int status;
    event->captured = stream->capture && !external;
    if (event->captured) return 0;
    status = enqueue(stream, (Op){.kind = RECORD, .event = event});
    if (!stream->capture) { event->recorded = 1; event->done = 0; event->stream = stream; }
    return status;
}
CALL(cuEventRecord, Event *event, Stream *stream) status = record(event, stream, 0); END
CALL(cuEventRecordWithFlags, Event *event, Stream *stream, unsigned flags)
    if (flags == 1 && !stream->capture) GIVE(INVALID_VALUE); /* external is for captures alone */
    status = record(event, stream, flags == 1); END
CALL(cuEventSynchronize, Event *event)
    if (event->captured) GIVE(CAPTURED_EVENT);
    if (event->recorded && !event->done) status = execute(event->stream, ~0ull); END
CALL(cuEventQuery, Event *event) status = event->recorded && !event->done ? NOT_READY : 0; END
CALL(cuEventElapsedTime, float *out, Event *start, Event *end_)
    if (start->captured || end_->captured) GIVE(CAPTURED_EVENT);
    if (!start->recorded || !end_->recorded) GIVE(INVALID_HANDLE);
    if (!start->done || !end_->done) GIVE(NOT_READY);
    *out = (float)((end_->us - start->us) / 1000); END
int cuEventElapsedTime_v2(float *out, Event *start, Event *end_) {
    return cuEventElapsedTime(out, start, end_);
}
/* Functions by their names alone: the network above and the crop kernel, whatever the image is. */
static const char *functions[] = {"head", "edgehp_crop"};
CALL(cuModuleLoadData, void **out, const void *image) (void)image; *out = (void *)&lock; END
CALL(cuModuleUnload, void *module) (void)module; END
CALL(cuModuleGetFunction, void **out, void *module, const char *name)
    (void)module;
    *out = !strcmp(name, functions[0]) ? functions : !strcmp(name, functions[1]) ? functions + 1
                                                                                : NULL;
    if (!*out) GIVE(NOT_FOUND); END
CALL(cuLaunchKernel, void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
     unsigned by, unsigned bz, unsigned shared, Stream *stream, void **arguments, void **extra)
    Op op = {.kind = HEAD, .target = *(u64 *)arguments[0], .source = *(u64 *)arguments[1]};
    (void)shared, (void)extra;
    if (function == functions) {
        op.third = *(u64 *)arguments[2];
        op.batch = *(int *)arguments[3];
        op.side = *(int *)arguments[4];
    } else {
        op.kind = CROP;
        op.side = *(int *)arguments[2];
        op.batch = gz;
        if (gx * bx < (unsigned)op.side || gy * by < (unsigned)op.side || bx * by * bz > 1024)
            GIVE(INVALID_VALUE);
    }
    status = enqueue(stream, op);
    END


int cuGetErrorString(int error, const char **out) {
    *out = error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered"
         : error == CONTEXT_DESTROYED ? "context is destroyed"
         : error == INVALID_CONTEXT ? "invalid device context" : "an error of the double";
    return 0;
}
int cuGetErrorName(int error, const char **out) { (void)error; *out = "CUDA_ERROR"; return 0; }

/* Name asked for, first driver that has it, where it is: the newest that fits is given. */
static const struct { const char *name; int since; void *function; } symbols[] = {
#define SAME(name) {#name, 2000, name}
#define NEWER(name, suffix) {#name, 3020, name##suffix}
    SAME(cuInit), SAME(cuDriverGetVersion), SAME(cuDeviceGetCount), SAME(cuDeviceGet),
    SAME(cuDeviceGetName), SAME(cuDeviceGetAttribute), SAME(cuDevicePrimaryCtxRetain),
    SAME(cuDevicePrimaryCtxGetState), SAME(cuCtxSetCurrent), SAME(cuCtxGetCurrent),
    SAME(cuCtxGetDevice), SAME(cuCtxSynchronize), SAME(cuCtxGetApiVersion), SAME(cuMemHostAlloc),
    SAME(cuMemFreeHost), SAME(cuMemsetD8Async), SAME(cuStreamCreate), SAME(cuStreamSynchronize),
    SAME(cuStreamQuery), SAME(cuStreamIsCapturing), SAME(cuStreamEndCapture),
    SAME(cuGraphDestroy), SAME(cuGraphExecDestroy), SAME(cuGraphLaunch), SAME(cuEventCreate),
    SAME(cuEventRecord), SAME(cuEventRecordWithFlags), SAME(cuEventSynchronize),
    SAME(cuEventQuery), SAME(cuModuleLoadData), SAME(cuModuleUnload), SAME(cuModuleGetFunction),
    SAME(cuLaunchKernel), SAME(cuGetErrorString), SAME(cuGetErrorName),
    NEWER(cuDeviceTotalMem, _v2), NEWER(cuDevicePrimaryCtxRelease, _v2),
    NEWER(cuDevicePrimaryCtxSetFlags, _v2), NEWER(cuCtxPushCurrent, _v2),
    NEWER(cuCtxPopCurrent, _v2), NEWER(cuMemGetInfo, _v2), NEWER(cuMemAlloc, _v2),
    NEWER(cuMemFree, _v2), NEWER(cuMemAllocHost, _v2), NEWER(cuMemHostGetDevicePointer, _v2),
    NEWER(cuMemcpyHtoDAsync, _v2), NEWER(cuMemcpyDtoHAsync, _v2), NEWER(cuStreamDestroy, _v2),
    NEWER(cuStreamBeginCapture, _v2), NEWER(cuEventDestroy, _v2),
    {"cuGraphInstantiateWithFlags", 11040, cuGraphInstantiateWithFlags},
    {"cuGraphInstantiate", 12000, cuGraphInstantiateWithFlags},
    {"cuEventElapsedTime", 2000, cuEventElapsedTime},
    {"cuEventElapsedTime", 12080, cuEventElapsedTime_v2},
};

int cuGetProcAddress_v2(const char *name, void **out, int asked, u64 flags, int *found) {
    int best = 0;
    (void)flags;
    *out = NULL;
    if (!strcmp(name, "cuGetProcAddress")) *out = cuGetProcAddress_v2;
    for (u64 i = 0; i < sizeof symbols / sizeof *symbols; i++)
        if (!strcmp(name, symbols[i].name) && symbols[i].since <= asked
            && symbols[i].since <= version && symbols[i].since > best) {
            best = symbols[i].since;
            *out = symbols[i].function;
        }
    /* 1: there is none; 2: this driver is too old for the one asked for. */
    if (found) *found = *out ? 0 : 1;
    return *out ? 0 : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **out, int asked, u64 flags) {
    return cuGetProcAddress_v2(name, out, asked, flags, NULL);
}

/* NVIDIA's own libraries look for private tables of the driver, NVRTC among them. There are none. */
int cuGetExportTable(const void **table, const void *id) {
    (void)id;
    *table = NULL;
    return NOT_FOUND;
}

/* What pycuda's module is linked to besides, or it cannot be loaded; edgehp calls none of it. */
#define NO(name) int name(void) { return NOT_SUPPORTED; }
NO(cuArray3DCreate_v2) NO(cuArray3DGetDescriptor_v2) NO(cuArrayCreate_v2) NO(cuArrayDestroy)
NO(cuArrayGetDescriptor_v2) NO(cuCtxAttach) NO(cuCtxCreate_v2) NO(cuCtxDetach)
NO(cuCtxDisablePeerAccess) NO(cuCtxEnablePeerAccess) NO(cuCtxGetCacheConfig) NO(cuCtxGetLimit)
NO(cuCtxGetSharedMemConfig) NO(cuCtxSetCacheConfig) NO(cuCtxSetLimit) NO(cuCtxSetSharedMemConfig)
NO(cuDeviceCanAccessPeer) NO(cuDeviceComputeCapability) NO(cuDeviceGetByPCIBusId)
NO(cuDeviceGetPCIBusId) NO(cuFuncGetAttribute) NO(cuFuncSetAttribute) NO(cuFuncSetBlockShape)
NO(cuFuncSetCacheConfig) NO(cuFuncSetSharedSize) NO(cuIpcCloseMemHandle) NO(cuIpcGetEventHandle)
NO(cuIpcGetMemHandle) NO(cuIpcOpenEventHandle) NO(cuIpcOpenMemHandle_v2) NO(cuLaunch)
NO(cuLaunchGrid) NO(cuLaunchGridAsync) NO(cuLinkAddData_v2) NO(cuLinkAddFile_v2) NO(cuLinkComplete)
NO(cuLinkCreate_v2) NO(cuLinkDestroy) NO(cuMemAllocManaged) NO(cuMemAllocPitch_v2)
NO(cuMemGetAddressRange_v2) NO(cuMemHostGetFlags) NO(cuMemHostRegister_v2) NO(cuMemHostUnregister)
NO(cuMemcpy2DAsync_v2) NO(cuMemcpy2DUnaligned_v2) NO(cuMemcpy2D_v2) NO(cuMemcpy3DAsync_v2)
NO(cuMemcpy3DPeer) NO(cuMemcpy3DPeerAsync) NO(cuMemcpy3D_v2) NO(cuMemcpyAtoA_v2) NO(cuMemcpyAtoD_v2)
NO(cuMemcpyAtoH_v2) NO(cuMemcpyDtoA_v2) NO(cuMemcpyDtoDAsync_v2) NO(cuMemcpyDtoD_v2)
NO(cuMemcpyDtoH_v2) NO(cuMemcpyHtoA_v2) NO(cuMemcpyHtoD_v2) NO(cuMemcpyPeer) NO(cuMemcpyPeerAsync)
NO(cuMemsetD16Async) NO(cuMemsetD16_v2) NO(cuMemsetD2D16Async) NO(cuMemsetD2D16_v2)
NO(cuMemsetD2D32Async) NO(cuMemsetD2D32_v2) NO(cuMemsetD2D8Async) NO(cuMemsetD2D8_v2)
NO(cuMemsetD32Async) NO(cuMemsetD32_v2) NO(cuMemsetD8_v2) NO(cuModuleGetGlobal_v2)
NO(cuModuleGetSurfRef) NO(cuModuleGetTexRef) NO(cuModuleLoad) NO(cuModuleLoadDataEx)
NO(cuParamSetSize) NO(cuParamSetTexRef) NO(cuParamSetf) NO(cuParamSeti) NO(cuParamSetv)
NO(cuProfilerInitialize) NO(cuProfilerStart) NO(cuProfilerStop) NO(cuStreamAttachMemAsync)
NO(cuStreamWaitEvent) NO(cuSurfRefGetArray) NO(cuSurfRefSetArray) NO(cuTexRefCreate)
NO(cuTexRefDestroy) NO(cuTexRefGetAddressMode) NO(cuTexRefGetAddress_v2) NO(cuTexRefGetArray)
NO(cuTexRefGetFilterMode) NO(cuTexRefGetFlags) NO(cuTexRefGetFormat) NO(cuTexRefSetAddress2D_v3)
NO(cuTexRefSetAddressMode) NO(cuTexRefSetAddress_v2) NO(cuTexRefSetArray) NO(cuTexRefSetFilterMode)
NO(cuTexRefSetFlags) NO(cuTexRefSetFormat)

/* The call `name` answers `status` once, after it was let through `after` times. */
void double_fail(const char *name, int status, int after) {
    snprintf(fail_name, sizeof fail_name, "%s", name);
    fail_status = status;
    fail_after = after;
}
/* Every kernel ends with this sticky error; 0: they work, and the contexts are as new. */
void double_fault(int status) {
    fault = status;
    for (int i = 0; i < DEVICES && !status; i++) primary[i].sticky = 0;
}
/* Blocks, streams, events and graphs that exist, and references to primary contexts. */
long double_live(void) {
    long sum = live;
    for (int i = 0; i < DEVICES; i++) sum += primary[i].refs;
    return sum;
}
/* Threads that ended with a context on their stack, and what this thread's holds. */
int double_abandoned(void) { return abandoned + stack()->depth; }
