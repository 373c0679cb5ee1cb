#include "protocol/transport/transfer.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/reader.h"
#include "crypto/hash.h"
#include "crypto/merkle.h"

#define CALL_TIMEOUT_MS 60000
#define ROUNDS_MAX 3    /* of BEGIN, when the server lost chunks or the whole upload in between */
#define FRAME_BYTES 256 /* an upper bound of what PUT and GET put beside a chunk */

struct transfer {
    const struct rpc_channel *channel;
    const struct transfer_options *options;
    int64_t deadline;
    uint32_t chunk_bytes;
    struct buffer request;
    struct buffer reply;
};

static int transfer_init(struct transfer *t, const struct rpc_channel *channel, const struct transfer_options *options,
                         struct error *err)
{
    assert(options->clock != NULL && options->rng != NULL);
    size_t room = channel->body_bytes_max - FRAME_BYTES;
    *t = (struct transfer){.channel = channel, .options = options, .chunk_bytes = options->chunk_bytes};
    buffer_init(&t->request, channel->body_bytes_max);
    buffer_init(&t->reply, channel->body_bytes_max);
    t->deadline = clock_monotonic_ms(options->clock) + options->deadline_ms;
    if (t->chunk_bytes == 0)
        for (t->chunk_bytes = TRANSFER_CHUNK_BYTES_MIN; t->chunk_bytes * 2 <= room; t->chunk_bytes *= 2)
            ;
    if (t->chunk_bytes < TRANSFER_CHUNK_BYTES_MIN || t->chunk_bytes > room)
        return error_set(err, ERR_CONFIG, "chunks of %u bytes: expected %u to %zu", t->chunk_bytes,
                         TRANSFER_CHUNK_BYTES_MIN, room);
    return 0;
}

static void transfer_release(struct transfer *t)
{
    buffer_release(&t->request);
    buffer_release(&t->reply);
}

/* Sends t->request until it is answered or the deadline passes: every method of this file may run twice. */
static int ask(struct transfer *t, uint16_t method, struct error *err)
{
    const struct transfer_options *o = t->options;
    if (!buffer_ok(&t->request))
        return error_set(err, ERR_RESOURCES, "no memory for a request of this transfer");
    for (unsigned attempt = 1;; attempt++) {
        uint16_t status = 0;
        int timeout = o->call_timeout_ms != 0 ? o->call_timeout_ms : CALL_TIMEOUT_MS;
        int rc = t->channel->call(t->channel->ctx, method, buffer_span(&t->request), &t->reply, &status, timeout, err);
        if (rc == 0)
            return rpc_status_error(status, buffer_span(&t->reply), err);
        int64_t wait = rpc_backoff_ms(o->rng, attempt, 500, 10000);
        if ((rc != ERR_CONNECT && rc != ERR_TIMEOUT) || clock_monotonic_ms(o->clock) + wait >= t->deadline)
            return rc;
        clock_sleep_ms(o->clock, wait);
    }
}

static void report(const struct transfer *t, uint64_t done, uint64_t total)
{
    if (t->options->progress != NULL)
        t->options->progress(t->options->progress_ctx, done, total);
}

void transfer_root(struct span data, uint32_t chunk_bytes, uint8_t ret_root[TLS_HASH_BYTES])
{
    struct merkle tree;
    merkle_init(&tree);
    for (size_t at = 0; at < data.len; at += chunk_bytes) {
        size_t left = data.len - at;
        merkle_add(&tree, span_of(data.ptr + at, left < chunk_bytes ? left : chunk_bytes));
    }
    merkle_root(&tree, ret_root);
}

static int send_missing(struct transfer *t, const struct transfer_id *id, struct span data, const uint8_t *held,
                        struct error *err)
{
    size_t n = (data.len + t->chunk_bytes - 1) / t->chunk_bytes;
    uint64_t done = 0;
    for (size_t i = 0; i < n; i++) {
        size_t at = i * t->chunk_bytes;
        size_t len = data.len - at < t->chunk_bytes ? data.len - at : t->chunk_bytes;
        if ((held[i / 8] >> (i % 8) & 1) == 0) {
            buffer_clear(&t->request);
            transfer_id_encode(&t->request, id);
            buffer_u32(&t->request, (uint32_t)i);
            buffer_bytes(&t->request, span_of(data.ptr + at, len));
            int rc = ask(t, TRANSFER_PUT, err);
            if (rc < 0)
                return rc;
        }
        done += len;
        report(t, done, data.len);
    }
    return 0;
}

/* BEGIN, the chunks that the server lacks, COMMIT. */
static int upload_round(struct transfer *t, const struct transfer_id *id, struct span data,
                        const uint8_t root[TLS_HASH_BYTES], struct error *err)
{
    uint8_t held[TRANSFER_CHUNKS_MAX / 8] = {0};
    size_t n = (data.len + t->chunk_bytes - 1) / t->chunk_bytes;
    buffer_clear(&t->request);
    transfer_id_encode(&t->request, id);
    buffer_u64(&t->request, data.len);
    buffer_u32(&t->request, t->chunk_bytes);
    buffer_append(&t->request, root, TLS_HASH_BYTES);
    int rc = ask(t, TRANSFER_BEGIN, err);
    if (rc < 0)
        return rc;
    struct reader r = reader_of(buffer_span(&t->reply));
    bool committed = reader_u8(&r) != 0;
    uint32_t count = reader_u32(&r);
    struct span bitmap = reader_bytes(&r, sizeof held);
    if (!reader_done(&r) || count != n || bitmap.len != (n + 7) / 8)
        return error_set(err, ERR_INTEGRITY, "the aggregator's answer to the start of an upload is malformed");
    memcpy(held, bitmap.ptr, bitmap.len);
    if (committed) {
        report(t, data.len, data.len);
        /* COMMIT once more all the same: its first answer may have been lost before the server took note. */
    } else if ((rc = send_missing(t, id, data, held, err)) < 0) {
        return rc;
    }
    buffer_clear(&t->request);
    transfer_id_encode(&t->request, id);
    return ask(t, TRANSFER_COMMIT, err);
}

int transfer_upload(const struct rpc_channel *channel, const struct transfer_id *id, struct span data,
                    const struct transfer_options *options, struct error *err)
{
    struct transfer t;
    uint8_t root[TLS_HASH_BYTES];
    if (!tls_id_valid(id->job) || !tls_id_valid(id->name))
        return error_set(err, ERR_CONFIG, "an upload's job and name are 1 to 64 of a-z 0-9 . _ -");
    int rc = transfer_init(&t, channel, options, err);
    if (rc == 0 && (data.len == 0 || (data.len - 1) / t.chunk_bytes >= TRANSFER_CHUNKS_MAX))
        rc = error_set(err, ERR_CONFIG, "an upload of %zu bytes in chunks of %u: expected 1 to %u chunks", data.len,
                       t.chunk_bytes, TRANSFER_CHUNKS_MAX);
    if (rc == 0) {
        transfer_root(data, t.chunk_bytes, root);
        int rounds = 0;
        do
            rc = upload_round(&t, id, data, root, err);
        while ((rc == ERR_NOT_FOUND || rc == ERR_AGAIN) && ++rounds < ROUNDS_MAX);
    }
    transfer_release(&t);
    return rc;
}

/* One range. The bytes are borrowed from t->reply. */
static int get_range(struct transfer *t, const char *name, const uint8_t sha256[TLS_HASH_BYTES], uint64_t offset,
                     uint64_t *ret_total, struct span *ret_bytes, struct error *err)
{
    buffer_clear(&t->request);
    buffer_string(&t->request, name);
    buffer_append(&t->request, sha256, TLS_HASH_BYTES);
    buffer_u64(&t->request, offset);
    buffer_u32(&t->request, t->chunk_bytes);
    int rc = ask(t, TRANSFER_GET, err);
    if (rc < 0)
        return rc;
    struct reader r = reader_of(buffer_span(&t->reply));
    uint64_t total = reader_u64(&r);
    struct span bytes = reader_bytes(&r, t->chunk_bytes);
    uint64_t expected = offset > total ? 0 : total - offset < t->chunk_bytes ? total - offset : t->chunk_bytes;
    if (!reader_done(&r) || bytes.len != expected)
        return error_set(err, ERR_INTEGRITY, "%s: the aggregator's answer at byte %llu is malformed", name,
                         (unsigned long long)offset);
    *ret_total = total;
    *ret_bytes = bytes;
    return 0;
}

int transfer_download(const struct rpc_channel *channel, const char *name, const uint8_t sha256[TLS_HASH_BYTES],
                      struct buffer *out, const struct transfer_options *options, struct error *err)
{
    struct transfer t;
    uint8_t hash[TLS_HASH_BYTES];
    size_t before = out->len;
    uint64_t total = 0;
    int rc = transfer_init(&t, channel, options, err);
    while (rc == 0) {
        struct span bytes;
        uint64_t now_total = 0;
        size_t have = out->len - before;
        rc = get_range(&t, name, sha256, have, &now_total, &bytes, err);
        if (rc == 0 && have > 0 && now_total != total)
            rc = error_set(err, ERR_INTEGRITY, "%s changed its size during the download", name);
        total = now_total;
        if (rc == 0 && total > out->max - before)
            rc = error_set(err, ERR_RESOURCES, "%s has %llu bytes, more than the %zu allowed here", name,
                           (unsigned long long)total, out->max - before);
        if (rc < 0)
            break;
        buffer_append(out, bytes.ptr, bytes.len);
        if (!buffer_ok(out))
            rc = error_set(err, ERR_RESOURCES, "%s: no memory for %llu bytes", name, (unsigned long long)total);
        report(&t, out->len - before, total);
        if (out->len - before == total)
            break;
    }
    if (rc == 0) {
        hash_bytes(span_of(out->data + before, out->len - before), hash);
        if (memcmp(hash, sha256, sizeof hash) != 0)
            rc = error_set(err, ERR_INTEGRITY, "%s: the bytes received do not have the announced SHA-256", name);
    }
    if (rc < 0)
        out->len = before;
    transfer_release(&t);
    return rc;
}

static int write_all(int fd, struct span bytes, const char *path, struct error *err)
{
    for (size_t at = 0; at < bytes.len;) {
        ssize_t n = write(fd, bytes.ptr + at, bytes.len - at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_set(err, ERR_RESOURCES, "%s: %s", path, strerror(errno));
        at += (size_t)n;
    }
    return 0;
}

/* Appends ranges to fd from `have` on until the object is whole. */
static int get_rest(struct transfer *t, int fd, const char *part, const char *name,
                    const uint8_t sha256[TLS_HASH_BYTES], uint64_t have, uint64_t size_max, struct error *err)
{
    for (;;) {
        struct span bytes;
        uint64_t total = 0;
        int rc = get_range(t, name, sha256, have, &total, &bytes, err);
        if (rc == 0 && total > size_max)
            rc = error_set(err, ERR_RESOURCES, "%s has %llu bytes, more than the %llu allowed here", name,
                           (unsigned long long)total, (unsigned long long)size_max);
        if (rc == 0)
            rc = write_all(fd, bytes, part, err);
        if (rc < 0)
            return rc;
        have += bytes.len;
        report(t, have, total);
        if (have >= total)
            return 0;
    }
}

int transfer_download_file(const struct rpc_channel *channel, const char *name, const uint8_t sha256[TLS_HASH_BYTES],
                           const char *path, uint64_t size_max, const struct transfer_options *options,
                           struct error *err)
{
    struct transfer t;
    char part[4096];
    uint8_t hash[TLS_HASH_BYTES];
    struct stat st;
    if (snprintf(part, sizeof part, "%s.part", path) >= (int)sizeof part)
        return error_set(err, ERR_CONFIG, "%s: the path is too long", path);
    int rc = transfer_init(&t, channel, options, err);
    int fd = rc == 0 ? open(part, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600) : -1;
    if (rc == 0 && (fd < 0 || fstat(fd, &st) < 0))
        rc = error_set(err, ERR_RESOURCES, "%s: %s", part, strerror(errno));
    if (rc == 0)
        rc = get_rest(&t, fd, part, name, sha256, (uint64_t)st.st_size, size_max, err);
    if (rc == 0 && fdatasync(fd) < 0)
        rc = error_set(err, ERR_RESOURCES, "%s: %s", part, strerror(errno));
    if (rc == 0)
        rc = hash_file(part, hash, NULL, err);
    if (rc == 0 && memcmp(hash, sha256, sizeof hash) != 0) {
        unlink(part); /* or every later attempt would resume from wrong bytes */
        rc = error_set(err, ERR_INTEGRITY, "%s: the bytes received do not have the announced SHA-256", name);
    }
    if (rc == 0 && rename(part, path) < 0)
        rc = error_set(err, ERR_RESOURCES, "%s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    transfer_release(&t);
    return rc;
}
