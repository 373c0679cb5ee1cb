#include "protocol/transport/transfer.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "protocol/transport/spool_upload.h"
#include "base/reader.h"

void transfer_id_encode(struct buffer *out, const struct transfer_id *id)
{
    buffer_string(out, id->job);
    buffer_u32(out, id->round);
    buffer_u32(out, id->attempt);
    buffer_string(out, id->name);
}

bool transfer_id_read(struct reader *r, struct transfer_id *ret)
{
    reader_string(r, ret->job, sizeof ret->job);
    ret->round = reader_u32(r);
    ret->attempt = reader_u32(r);
    reader_string(r, ret->name, sizeof ret->name);
    return !r->failed && tls_id_valid(ret->job) && tls_id_valid(ret->name);
}

int transfer_begin_decode(struct span body, struct transfer_begin *ret, struct error *err)
{
    struct reader r = reader_of(body);
    struct transfer_begin begin = {0};
    bool id_ok = transfer_id_read(&r, &begin.id);
    begin.size_bytes = reader_u64(&r);
    begin.chunk_bytes = reader_u32(&r);
    reader_copy(&r, begin.root, sizeof begin.root);
    if (!reader_done(&r) || !id_ok)
        return error_set(err, ERR_INTEGRITY, "malformed start of an upload");
    if (begin.size_bytes == 0 || begin.chunk_bytes < TRANSFER_CHUNK_BYTES_MIN ||
        (begin.size_bytes - 1) / begin.chunk_bytes >= TRANSFER_CHUNKS_MAX)
        return error_set(err, ERR_INTEGRITY,
                         "an upload of %llu bytes in chunks of %u: expected 1 to %u chunks of at "
                         "least %u bytes",
                         (unsigned long long)begin.size_bytes, begin.chunk_bytes, TRANSFER_CHUNKS_MAX,
                         TRANSFER_CHUNK_BYTES_MIN);
    *ret = begin;
    return 0;
}

int transfer_get_decode(struct span body, struct transfer_get *ret, struct error *err)
{
    struct reader r = reader_of(body);
    struct transfer_get get = {0};
    reader_string(&r, get.name, sizeof get.name);
    reader_copy(&r, get.sha256, sizeof get.sha256);
    get.offset = reader_u64(&r);
    get.length = reader_u32(&r);
    if (!reader_done(&r) || !tls_id_valid(get.name) || get.length == 0)
        return error_set(err, ERR_INTEGRITY, "malformed request for a download");
    *ret = get;
    return 0;
}

static int range_of(const struct transfer_get *get, uint64_t total, struct rpc_reply *reply, size_t *ret_len)
{
    if (get->offset > total)
        return error_set(&reply->error, ERR_INTEGRITY, "byte %llu of %s, which has %llu",
                         (unsigned long long)get->offset, get->name, (unsigned long long)total);
    uint64_t left = total - get->offset;
    *ret_len = left < get->length ? (size_t)left : get->length;
    buffer_u64(&reply->body, total);
    buffer_u32(&reply->body, (uint32_t)*ret_len);
    return 0;
}

int transfer_get_reply(const struct transfer_get *get, struct span object, struct rpc_reply *reply)
{
    size_t len = 0;
    int rc = range_of(get, object.len, reply, &len);
    if (rc == 0)
        buffer_append(&reply->body, object.ptr + get->offset, len);
    return rc;
}

int transfer_get_reply_file(const struct transfer_get *get, const char *path, struct rpc_reply *reply)
{
    struct stat st;
    size_t len = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0) {
        int why = errno;
        if (fd >= 0)
            close(fd);
        return error_set(&reply->error, why == ENOENT ? ERR_NOT_FOUND : ERR_RESOURCES, "%s cannot be read: %s",
                         get->name, strerror(why));
    }
    int rc = range_of(get, (uint64_t)st.st_size, reply, &len);
    uint8_t *out = rc == 0 && len > 0 ? buffer_extend(&reply->body, len) : NULL;
    for (size_t at = 0; out != NULL && at < len;) {
        ssize_t n = pread(fd, out + at, len - at, (off_t)(get->offset + at));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            rc = error_set(&reply->error, ERR_RESOURCES, "%s became shorter while it was read", get->name);
            break;
        }
        at += (size_t)n;
    }
    close(fd);
    return rc;
}
