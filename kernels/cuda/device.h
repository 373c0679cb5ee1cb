/*
 * Internal to kernels/cuda: the little of the CUDA runtime that is used, so that the shim can stand in for it.
 * device.cu on a card, shim/device_host.cpp under the shim (device memory is then host memory, streams do everything at
 * once).
 *
 * Functions that can fail return 0 or a negative ERR_ code. A launch's failure shows at the next device_sync.
 */
#ifndef KERNELS_CUDA_DEVICE_H
#define KERNELS_CUDA_DEVICE_H

extern "C" {
#include "base/error.h"
}
#include "kernels/cuda/cuda.h"

struct device_info {
    char name[64];
    int major, minor; /* compute capability */
    int multiprocessors;
    size_t memory_bytes, free_bytes;
};

/* Makes device `ordinal` the calling thread's. ERR_NOT_FOUND: no driver or no such device, in plain words. */
int MUST_USE device_open(int ordinal, struct device_info *ret_info, struct error *err);
void device_use(int ordinal); /* again, for a thread that may have used another one */
int device_capability(void);  /* 10·major + minor of the calling thread's device */
size_t device_free_bytes(void);

int MUST_USE device_alloc(size_t bytes, void **ret);        /* zeroed, 256-byte aligned; ERR_RESOURCES */
void device_release(void *at);                              /* accepts NULL */
int MUST_USE device_pinned_alloc(size_t bytes, void **ret); /* host memory that copies fast; ERR_RESOURCES */
void device_pinned_release(void *at);

int MUST_USE device_stream_new(stream_t *ret);
void device_stream_free(stream_t s);
void device_upload(stream_t s, void *to, const void *from, size_t bytes);   /* from: pinned, or it waits */
void device_download(stream_t s, void *to, const void *from, size_t bytes); /* device_sync before reading */
void device_copy(stream_t s, void *to, const void *from, size_t bytes);
void device_zero(stream_t s, void *at, size_t bytes);
void device_after(stream_t s, stream_t other); /* what s does from here on waits for what other has been given so far */
int MUST_USE device_sync(stream_t s, struct error *err); /* waits; ERR_FAILED or ERR_RESOURCES says what failed */

/* A place in a stream that the host can wait for; before the first device_mark_set there is nothing to wait for. NULL:
 * none can be had. */
struct device_mark;
struct device_mark *device_mark_new(void);
void device_mark_free(struct device_mark *mark);
void device_mark_set(struct device_mark *mark, stream_t s);
void device_mark_wait(struct device_mark *mark);
/* Milliseconds between two marks that were waited for. */
float device_mark_elapsed_ms(struct device_mark *from, struct device_mark *to);

/* Whether a launch of the calling thread has failed since its last device_sync, which says what. */
bool device_failed(void);

/* Recorded work. device_record_begin .. _end catch what is enqueued on s in between; false if that cannot be begun.
 * NULL if it cannot be recorded or a launch failed meanwhile: that failure is then forgotten, since the work has to be
 * done anew. No launch may have failed before (device_failed). */
struct recording;
bool device_record_begin(stream_t s);
struct recording *device_record_end(stream_t s);
void device_replay(stream_t s, struct recording *recording);
void device_recording_free(struct recording *recording);

#endif
