/* The CUDA runtime behind device.h. */
#include "kernels/cuda/device.h"

#include <stdio.h>
#include <stdlib.h>

static int fail(cudaError_t e, const char *doing, struct error *err)
{
    const int code = e == cudaErrorMemoryAllocation ? ERR_RESOURCES : ERR_FAILED;
    return error_set(err, code, "CUDA failed while %s: %s (%s)", doing, cudaGetErrorString(e), cudaGetErrorName(e));
}

int device_open(int ordinal, struct device_info *ret_info, struct error *err)
{
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaErrorInsufficientDriver)
        return error_set(
            err, ERR_NOT_FOUND,
            "no NVIDIA driver for CUDA %d.%d: `nvidia-smi` shows whether one is installed and how old it is",
            CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    if (e == cudaErrorNoDevice || (e == cudaSuccess && count == 0))
        return error_set(err, ERR_NOT_FOUND, "no CUDA device: none is installed or CUDA_VISIBLE_DEVICES hides it");
    if (e != cudaSuccess)
        return error_set(err, ERR_NOT_FOUND, "CUDA cannot start: %s", cudaGetErrorString(e));
    if (ordinal < 0 || ordinal >= count)
        return error_set(err, ERR_NOT_FOUND, "no CUDA device %d: there are %d, counted from 0", ordinal, count);
    cudaDeviceProp p;
    size_t free_bytes = 0, total = 0;
    if ((e = cudaSetDevice(ordinal)) != cudaSuccess || (e = cudaGetDeviceProperties(&p, ordinal)) != cudaSuccess ||
        (e = cudaMemGetInfo(&free_bytes, &total)) != cudaSuccess)
        return fail(e, "opening the device", err);
    struct device_info info = {};
    snprintf(info.name, sizeof info.name, "%.63s", p.name);
    info.major = p.major;
    info.minor = p.minor;
    info.multiprocessors = p.multiProcessorCount;
    info.memory_bytes = total;
    info.free_bytes = free_bytes;
    *ret_info = info;
    return 0;
}

void device_use(int ordinal)
{
    cudaSetDevice(ordinal);
}

int device_capability(void)
{
    static thread_local int known = -1, capability; /* of device `known` */
    int ordinal = -1, major = 0, minor = 0;
    if (cudaGetDevice(&ordinal) == cudaSuccess && ordinal != known &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) == cudaSuccess) {
        known = ordinal;
        capability = 10 * major + minor;
    }
    return capability;
}

size_t device_free_bytes(void)
{
    size_t free_bytes = 0, total = 0;
    return cudaMemGetInfo(&free_bytes, &total) == cudaSuccess ? free_bytes : 0;
}

/* A launch's failure that nobody has asked for yet: kept apart, so that no call that fails by itself forgets it. */
static thread_local cudaError_t pending = cudaSuccess;

static void keep_pending(void)
{
    cudaError_t last = cudaGetLastError();
    if (pending == cudaSuccess)
        pending = last;
}

bool device_failed(void)
{
    keep_pending();
    return pending != cudaSuccess;
}

int device_alloc(size_t bytes, void **ret)
{
    void *at = NULL;
    keep_pending();
    if (cudaMalloc(&at, bytes ? bytes : 1) != cudaSuccess) {
        cudaGetLastError(); /* not to be taken for a launch's failure later */
        return ERR_RESOURCES;
    }
    /* The streams here do not wait for the one that this memset is on. Waiting for that one alone: to wait for the
     * whole device would break what another thread is recording. */
    if (cudaMemsetAsync(at, 0, bytes, cudaStreamLegacy) != cudaSuccess ||
        cudaStreamSynchronize(cudaStreamLegacy) != cudaSuccess) {
        cudaGetLastError();
        cudaFree(at);
        return ERR_RESOURCES;
    }
    *ret = at;
    return 0;
}

void device_release(void *at)
{
    cudaFree(at);
}

int device_pinned_alloc(size_t bytes, void **ret)
{
    keep_pending();
    if (cudaHostAlloc(ret, bytes ? bytes : 1, cudaHostAllocDefault) == cudaSuccess)
        return 0;
    cudaGetLastError();
    return ERR_RESOURCES;
}

void device_pinned_release(void *at)
{
    cudaFreeHost(at);
}

int device_stream_new(stream_t *ret)
{
    return cudaStreamCreateWithFlags(ret, cudaStreamNonBlocking) == cudaSuccess ? 0 : ERR_RESOURCES;
}

void device_stream_free(stream_t s)
{
    if (s)
        cudaStreamDestroy(s);
}

void device_upload(stream_t s, void *to, const void *from, size_t bytes)
{
    cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, s);
}

void device_download(stream_t s, void *to, const void *from, size_t bytes)
{
    cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, s);
}

void device_copy(stream_t s, void *to, const void *from, size_t bytes)
{
    cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, s);
}

void device_zero(stream_t s, void *at, size_t bytes)
{
    cudaMemsetAsync(at, 0, bytes, s);
}

void device_after(stream_t s, stream_t other)
{
    cudaEvent_t done;
    if (cudaEventCreateWithFlags(&done, cudaEventDisableTiming) != cudaSuccess)
        return; /* shows at the next device_sync */
    if (cudaEventRecord(done, other) == cudaSuccess)
        cudaStreamWaitEvent(s, done, 0);
    cudaEventDestroy(done);
}

int device_sync(stream_t s, struct error *err)
{
    keep_pending();
    cudaError_t e = cudaStreamSynchronize(s);
    if (e == cudaSuccess)
        e = pending;
    cudaGetLastError();
    pending = cudaSuccess;
    return e == cudaSuccess ? 0 : fail(e, "computing", err);
}

struct device_mark {
    cudaEvent_t event;
};

struct device_mark *device_mark_new(void)
{
    struct device_mark *m = static_cast<struct device_mark *>(malloc(sizeof *m));
    if (m && cudaEventCreate(&m->event) == cudaSuccess)
        return m;
    free(m);
    return NULL;
}

void device_mark_free(struct device_mark *mark)
{
    if (!mark)
        return;
    cudaEventDestroy(mark->event);
    free(mark);
}

void device_mark_set(struct device_mark *mark, stream_t s)
{
    cudaEventRecord(mark->event, s);
}

void device_mark_wait(struct device_mark *mark)
{
    cudaEventSynchronize(mark->event);
}

float device_mark_elapsed_ms(struct device_mark *from, struct device_mark *to)
{
    float ms = 0;
    return cudaEventElapsedTime(&ms, from->event, to->event) == cudaSuccess ? ms : INFINITY;
}

struct recording {
    cudaGraphExec_t exec;
};

bool device_record_begin(stream_t s)
{
    keep_pending();
    if (cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal) == cudaSuccess)
        return true;
    cudaGetLastError();
    return false;
}

struct recording *device_record_end(stream_t s)
{
    cudaGraph_t graph = NULL;
    struct recording *r = static_cast<struct recording *>(malloc(sizeof *r));
    keep_pending(); /* a launch that was refused need not end the capture, which then lacks it */
    const bool launched = pending == cudaSuccess;
    if (cudaStreamEndCapture(s, &graph) != cudaSuccess || !graph || !launched || !r ||
        cudaGraphInstantiate(&r->exec, graph, 0) != cudaSuccess) {
        free(r);
        r = NULL;
    }
    if (graph)
        cudaGraphDestroy(graph);
    cudaGetLastError();
    pending = cudaSuccess;
    return r;
}

void device_replay(stream_t s, struct recording *recording)
{
    cudaGraphLaunch(recording->exec, s);
}

void device_recording_free(struct recording *recording)
{
    if (!recording)
        return;
    cudaGraphExecDestroy(recording->exec);
    free(recording);
}
