/* device.h without a device: memory is the host's, streams do everything at once, recordings are lists of calls. */
#include <map>
#include <mutex>
#include <vector>

#include "kernels/cuda/device.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MEMORY_BYTES_DEFAULT (64ull << 30)
#define DEVICE_ALIGNMENT 256

struct recording {
    std::vector<shim_work *> works;
    bool broken; /* by something that a recording does not allow */
    ~recording()
    {
        for (shim_work *work : works)
            delete work;
    }
};

struct shim_stream {
    struct recording *recording; /* under way */
};

static std::mutex lock;
static std::map<void *, size_t> allocations; /* of the device: rounded bytes by address */
static size_t used_bytes, other_allocations;
static int next_sync_failure;
static size_t replays;
static thread_local struct recording *recording_here; /* the thread's */
static thread_local int launches_until_failure, failures_left, failures_apart;
static thread_local bool launch_failed; /* since the last device_sync */
static int capability_set;              /* 0: not */

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
    const char *devices = getenv("CONSILIUM_SHIM_DEVICES");
    if (ordinal != 0 || (devices && strcmp(devices, "0") == 0))
        return error_set(err, ERR_NOT_FOUND, "no CUDA device %d: the shim has device 0 at most", ordinal);
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

/* Memory that was given back is never another's: who still goes there ends the process. AddressSanitizer sees to that
 * by itself, and to what is behind the bytes. */
#if defined(__SANITIZE_ADDRESS__)
static void *zeroed(size_t bytes)
{
    void *at = NULL;
    if (posix_memalign(&at, DEVICE_ALIGNMENT, bytes ? bytes : 1) != 0)
        return NULL;
    memset(at, 0, bytes);
    return at;
}

static void give_back(void *at, size_t)
{
    free(at);
}
#else
static void *zeroed(size_t bytes)
{
    void *at = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static void give_back(void *at, size_t bytes)
{
    if (mmap(at, bytes ? bytes : 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != at)
        abort();
}
#endif

/* What waits or takes memory cannot be part of a recording, and ends it. */
static bool breaks_recording(void)
{
    if (recording_here)
        recording_here->broken = true;
    return recording_here != NULL;
}

int device_alloc(size_t bytes, void **ret)
{
    if (breaks_recording())
        return ERR_RESOURCES;
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
    breaks_recording();
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations.find(at);
    if (found == allocations.end()) {
        fprintf(stderr, "shim: device_release of memory that device_alloc did not give\n");
        abort();
    }
    used_bytes -= found->second;
    give_back(at, found->second);
    allocations.erase(found);
}

int device_pinned_alloc(size_t bytes, void **ret)
{
    std::lock_guard<std::mutex> guard(lock);
    void *at = calloc(1, bytes ? bytes : 1);
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
    stream_t s = new shim_stream();
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
    assert(!s->recording);
    delete s;
}

bool shim_recording(stream_t s)
{
    return s && s->recording;
}

void shim_keep(stream_t s, struct shim_work *work)
{
    s->recording->works.push_back(work);
}

void shim_fail_launches(int others, int times)
{
    launches_until_failure = failures_apart = others;
    failures_left = times;
}

bool shim_launch_fails(void)
{
    if (failures_left == 0 || launches_until_failure-- > 0)
        return false;
    launches_until_failure = failures_apart;
    failures_left--;
    launch_failed = true;
    return true;
}

static void copy_bytes(stream_t s, void *to, const void *from, size_t bytes)
{
    if (bytes && !shim_record(s, [=] { memcpy(to, from, bytes); }))
        memcpy(to, from, bytes);
}

void device_upload(stream_t s, void *to, const void *from, size_t bytes)
{
    copy_bytes(s, to, from, bytes);
}

void device_download(stream_t s, void *to, const void *from, size_t bytes)
{
    copy_bytes(s, to, from, bytes);
}

void device_copy(stream_t s, void *to, const void *from, size_t bytes)
{
    copy_bytes(s, to, from, bytes);
}

void device_zero(stream_t s, void *at, size_t bytes)
{
    if (bytes && !shim_record(s, [=] { memset(at, 0, bytes); }))
        memset(at, 0, bytes);
}

/* A recording may not wait for work outside it, nor may work outside wait for it. */
void device_after(stream_t s, stream_t other)
{
    if (s->recording || other->recording)
        breaks_recording();
}

int device_sync(stream_t s, struct error *err)
{
    if (s && s->recording && breaks_recording())
        return error_set(err, ERR_FAILED, "a recording was waited for");
    std::lock_guard<std::mutex> guard(lock);
    const bool failed = launch_failed;
    int code = next_sync_failure;
    next_sync_failure = 0;
    launch_failed = false;
    return code || failed ? error_set(err, code ? code : ERR_FAILED, "the shim was told to fail") : 0;
}

bool device_record_begin(stream_t s)
{
    assert(!s->recording && !recording_here && !launch_failed);
    s->recording = recording_here = new recording();
    return true;
}

struct recording *device_record_end(stream_t s)
{
    struct recording *r = s->recording;
    s->recording = recording_here = NULL;
    const bool failed = launch_failed || r->broken;
    launch_failed = false;
    if (failed) {
        delete r;
        return NULL;
    }
    std::lock_guard<std::mutex> guard(lock);
    other_allocations++;
    return r;
}

void device_replay(stream_t s, struct recording *recording)
{
    assert(!s->recording);
    for (shim_work *work : recording->works)
        work->run();
    std::lock_guard<std::mutex> guard(lock);
    replays++;
}

size_t shim_replays(void)
{
    std::lock_guard<std::mutex> guard(lock);
    return replays;
}

void device_recording_free(struct recording *recording)
{
    if (!recording)
        return;
    std::lock_guard<std::mutex> guard(lock);
    other_allocations--;
    delete recording;
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
    breaks_recording();
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
    return launch_failed;
}
