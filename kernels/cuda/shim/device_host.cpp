/* device.h without a device: memory is the host's, streams do everything at once, nothing is recorded. */
#include <map>
#include <mutex>

#include "kernels/cuda/device.h"

#include <stdlib.h>
#include <string.h>

#define MEMORY_BYTES_DEFAULT (64ull << 30)
#define DEVICE_ALIGNMENT 256

struct shim_stream {
    int unused;
};

static std::mutex lock;
static std::map<void *, size_t> allocations; /* of the device: rounded bytes by address */
static size_t used_bytes, other_allocations;
static int next_sync_failure;
static int capability_set; /* 0: not */

static size_t memory_bytes(void)
{
    const char *text = getenv("CONSILIUM_SHIM_MEMORY_BYTES");
    return text && *text ? (size_t)strtoull(text, NULL, 10) : (size_t)MEMORY_BYTES_DEFAULT;
}

static size_t free_bytes(void)
{
    size_t all = memory_bytes();
    return all > used_bytes ? all - used_bytes : 0;
}

size_t shim_live_allocations(void)
{
    std::lock_guard<std::mutex> guard(lock);
    return allocations.size() + other_allocations;
}

size_t shim_live_bytes(void)
{
    std::lock_guard<std::mutex> guard(lock);
    return used_bytes;
}

void shim_fail_next_sync(int code)
{
    std::lock_guard<std::mutex> guard(lock);
    next_sync_failure = code;
}

void shim_capability(int capability)
{
    capability_set = capability;
}

int device_capability(void)
{
    const char *text = getenv("CONSILIUM_SHIM_CAPABILITY");
    if (capability_set)
        return capability_set;
    return text && *text ? (int)strtol(text, NULL, 10) : 90;
}

int device_open(int ordinal, struct device_info *ret_info, struct error *err)
{
    if (ordinal != 0)
        return error_set(err, ERR_NOT_FOUND, "no CUDA device %d: the shim has device 0 only", ordinal);
    std::lock_guard<std::mutex> guard(lock);
    struct device_info info = {};
    memcpy(info.name, "shim", sizeof "shim");
    info.major = device_capability() / 10;
    info.minor = device_capability() % 10;
    info.multiprocessors = 4;
    info.memory_bytes = memory_bytes();
    info.free_bytes = free_bytes();
    *ret_info = info;
    return 0;
}

void device_use(int ordinal)
{
    assert(ordinal == 0);
    (void)ordinal;
}

size_t device_free_bytes(void)
{
    std::lock_guard<std::mutex> guard(lock);
    return free_bytes();
}

/* Exactly `bytes`, so that AddressSanitizer sees what is read or written behind them. */
static void *zeroed(size_t bytes)
{
    void *at = NULL;
    if (posix_memalign(&at, DEVICE_ALIGNMENT, bytes ? bytes : 1) != 0)
        return NULL;
    memset(at, 0, bytes);
    return at;
}

int device_alloc(size_t bytes, void **ret)
{
    std::lock_guard<std::mutex> guard(lock);
    size_t rounded = (bytes + DEVICE_ALIGNMENT - 1) / DEVICE_ALIGNMENT * DEVICE_ALIGNMENT;
    if (rounded < bytes || rounded > free_bytes())
        return ERR_RESOURCES;
    void *at = zeroed(bytes);
    if (!at)
        return ERR_RESOURCES;
    allocations[at] = rounded;
    used_bytes += rounded;
    *ret = at;
    return 0;
}

void device_release(void *at)
{
    if (!at)
        return;
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations.find(at);
    if (found == allocations.end()) {
        fprintf(stderr, "shim: device_release of memory that device_alloc did not give\n");
        abort();
    }
    used_bytes -= found->second;
    allocations.erase(found);
    free(at);
}

int device_pinned_alloc(size_t bytes, void **ret)
{
    std::lock_guard<std::mutex> guard(lock);
    void *at = zeroed(bytes);
    if (!at)
        return ERR_RESOURCES;
    other_allocations++;
    *ret = at;
    return 0;
}

void device_pinned_release(void *at)
{
    if (!at)
        return;
    std::lock_guard<std::mutex> guard(lock);
    other_allocations--;
    free(at);
}

int device_stream_new(stream_t *ret)
{
    std::lock_guard<std::mutex> guard(lock);
    stream_t s = static_cast<stream_t>(calloc(1, sizeof *s));
    if (!s)
        return ERR_RESOURCES;
    other_allocations++;
    *ret = s;
    return 0;
}

void device_stream_free(stream_t s)
{
    if (!s)
        return;
    std::lock_guard<std::mutex> guard(lock);
    other_allocations--;
    free(s);
}

void device_upload(stream_t, void *to, const void *from, size_t bytes)
{
    if (bytes)
        memcpy(to, from, bytes);
}

void device_download(stream_t, void *to, const void *from, size_t bytes)
{
    if (bytes)
        memcpy(to, from, bytes);
}

void device_copy(stream_t, void *to, const void *from, size_t bytes)
{
    if (bytes)
        memcpy(to, from, bytes);
}

void device_zero(stream_t, void *at, size_t bytes)
{
    if (bytes)
        memset(at, 0, bytes);
}

void device_after(stream_t s, stream_t other)
{
    (void)s;
    (void)other;
}

int device_sync(stream_t, struct error *err)
{
    std::lock_guard<std::mutex> guard(lock);
    int code = next_sync_failure;
    next_sync_failure = 0;
    return code ? error_set(err, code, "the shim was told to fail") : 0;
}

bool device_record_begin(stream_t)
{
    return false;
}

struct recording *device_record_end(stream_t)
{
    return NULL;
}

void device_replay(stream_t, struct recording *)
{
    assert(!"the shim records nothing");
}

void device_recording_free(struct recording *recording)
{
    assert(!recording);
    (void)recording;
}

struct device_mark {
    int unused;
};

struct device_mark *device_mark_new(void)
{
    return static_cast<struct device_mark *>(calloc(1, sizeof(struct device_mark)));
}

void device_mark_free(struct device_mark *mark)
{
    free(mark);
}

void device_mark_set(struct device_mark *mark, stream_t s)
{
    (void)mark;
    (void)s;
}

void device_mark_wait(struct device_mark *mark)
{
    (void)mark;
}

float device_mark_elapsed_ms(struct device_mark *from, struct device_mark *to)
{
    (void)from;
    (void)to;
    return 0;
}

bool device_failed(void)
{
    return false;
}
