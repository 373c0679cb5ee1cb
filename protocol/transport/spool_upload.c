#include "protocol/transport/spool_upload.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "base/file.h"
#include "crypto/merkle.h"

#define MAP_MAGIC "CSPOOL1\n"
#define MAP_HEAD_BYTES (8 + 8 + 4 + 4 + HASH_SIZE)
#define MAP_BYTES_MAX (MAP_HEAD_BYTES + (size_t)TRANSFER_CHUNKS_MAX * HASH_SIZE)

static const uint8_t none[HASH_SIZE];

int upload_path(const char *folder, const char *site, const struct transfer_id *id, const char *suffix,
                char out[SPOOL_PATH_SIZE], struct error *err)
{
    assert(tls_id_valid(site) && tls_id_valid(id->job) && tls_id_valid(id->name));
    int n = snprintf(out, SPOOL_PATH_SIZE, "%s/%s/r%u.a%u/%s/%s%s", folder, id->job, id->round, id->attempt, site,
                     id->name, suffix);
    if (n >= SPOOL_PATH_SIZE)
        return error_set(err, ERR_CONFIG, "the spool folder's path is too long");
    return 0;
}

static uint32_t chunk_count(const struct transfer_begin *begin)
{
    assert(begin->size_bytes > 0 && begin->chunk_bytes > 0);
    return (uint32_t)((begin->size_bytes - 1) / begin->chunk_bytes + 1);
}

static size_t chunk_length(const struct transfer_begin *begin, uint32_t index)
{
    uint64_t left = begin->size_bytes - (uint64_t)index * begin->chunk_bytes;
    return left < begin->chunk_bytes ? (size_t)left : begin->chunk_bytes;
}

void upload_free(struct upload *u)
{
    if (u == NULL)
        return;
    free(u->leaves);
    free(u);
}

static struct upload *upload_new(const char *site, const struct transfer_begin *begin)
{
    struct upload *u = calloc(1, sizeof *u);
    if (u == NULL)
        return NULL;
    snprintf(u->site, sizeof u->site, "%s", site);
    u->begin = *begin;
    u->chunks = chunk_count(begin);
    u->leaves = calloc(u->chunks, HASH_SIZE);
    if (u->leaves == NULL) {
        upload_free(u);
        return NULL;
    }
    return u;
}

static int io_error(const char *path, int why, struct error *err)
{
    return error_set(err, ERR_RESOURCES, "%s: %s", path, strerror(why));
}

static int write_at(int fd, struct span bytes, uint64_t offset)
{
    for (size_t at = 0; at < bytes.len;) {
        ssize_t n = pwrite(fd, bytes.ptr + at, bytes.len - at, (off_t)(offset + at));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        at += (size_t)n;
    }
    return 0;
}

static int write_map(const char *path, const struct upload *u, struct error *err)
{
    struct buffer b;
    buffer_init(&b, MAP_BYTES_MAX);
    buffer_append(&b, MAP_MAGIC, 8);
    buffer_u64(&b, u->begin.size_bytes);
    buffer_u32(&b, u->begin.chunk_bytes);
    buffer_u32(&b, u->chunks);
    buffer_append(&b, u->begin.root, HASH_SIZE);
    buffer_append(&b, u->leaves, (size_t)u->chunks * HASH_SIZE);
    int rc = buffer_ok(&b) ? file_write_atomic(path, buffer_span(&b), 0600, err)
                           : error_set(err, ERR_RESOURCES, "no memory for %s", path);
    buffer_release(&b);
    return rc;
}

int upload_create(const char *folder, const char *site, const struct transfer_begin *begin, struct upload **ret,
                  struct error *err)
{
    char path[SPOOL_PATH_SIZE];
    struct upload *u = upload_new(site, begin);
    int fd = -1;
    int rc = u != NULL ? upload_path(folder, site, &begin->id, "", path, err)
                       : error_set(err, ERR_RESOURCES, "no memory for an upload");
    if (rc < 0)
        goto out;
    *strrchr(path, '/') = '\0';
    rc = file_make_folder(path, 0700, err);
    if (rc == 0)
        rc = upload_path(folder, site, &begin->id, ".part", path, err);
    if (rc < 0)
        goto out;
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) {
        rc = io_error(path, errno, err);
        goto out;
    }
    /* All of the space now: a full disk is told to the first site that asks, not found out at its last chunk. */
    int why = posix_fallocate(fd, 0, (off_t)begin->size_bytes);
    if (why != 0) {
        unlink(path);
        rc = io_error(path, why, err);
        goto out;
    }
    rc = upload_path(folder, site, &begin->id, ".map", path, err);
    if (rc == 0)
        rc = write_map(path, u, err);
out:
    if (fd >= 0)
        close(fd);
    if (rc < 0)
        upload_free(u);
    else
        *ret = u;
    return rc;
}

int upload_read_map(const char *path, struct transfer_begin *ret_begin, struct buffer *ret_leaves, struct error *err)
{
    struct buffer b;
    buffer_init(&b, MAP_BYTES_MAX);
    int rc = file_read(path, &b, err);
    if (rc == 0) {
        struct reader r = reader_of(buffer_span(&b));
        struct transfer_begin begin = {.id = ret_begin->id};
        struct span magic = reader_take(&r, 8);
        begin.size_bytes = reader_u64(&r);
        begin.chunk_bytes = reader_u32(&r);
        uint32_t n = reader_u32(&r);
        reader_copy(&r, begin.root, HASH_SIZE);
        bool sane = !r.failed && memcmp(magic.ptr, MAP_MAGIC, 8) == 0 && begin.size_bytes > 0 &&
                    begin.chunk_bytes >= TRANSFER_CHUNK_BYTES_MIN &&
                    (begin.size_bytes - 1) / begin.chunk_bytes < TRANSFER_CHUNKS_MAX && n == chunk_count(&begin) &&
                    r.rest.len == (size_t)n * HASH_SIZE;
        if (!sane) {
            rc = error_set(err, ERR_INTEGRITY, "%s: not a spool map", path);
        } else {
            *ret_begin = begin;
            if (ret_leaves != NULL)
                buffer_append(ret_leaves, r.rest.ptr, r.rest.len);
        }
    }
    buffer_release(&b);
    return rc;
}

/* Clears the hash of each chunk whose bytes on the disk are others. */
static void check_chunks(struct upload *u, struct span bytes)
{
    for (uint32_t i = 0; i < u->chunks; i++) {
        uint8_t leaf[HASH_SIZE];
        if (memcmp(u->leaves[i], none, HASH_SIZE) == 0)
            continue;
        uint64_t at = (uint64_t)i * u->begin.chunk_bytes;
        size_t len = chunk_length(&u->begin, i);
        if (at + len <= bytes.len)
            merkle_leaf(span_of(bytes.ptr + at, len), leaf);
        if (at + len > bytes.len || memcmp(leaf, u->leaves[i], HASH_SIZE) != 0)
            memset(u->leaves[i], 0, HASH_SIZE);
        else
            u->held++;
    }
}

int upload_load(const char *folder, const char *site, const struct transfer_id *id, struct upload **ret,
                struct error *err)
{
    char path[SPOOL_PATH_SIZE];
    struct transfer_begin begin = {.id = *id};
    struct buffer leaves;
    struct span map = {0};
    struct upload *u = NULL;
    buffer_init(&leaves, MAP_BYTES_MAX);
    int rc = upload_path(folder, site, id, ".map", path, err);
    if (rc == 0)
        rc = upload_read_map(path, &begin, &leaves, err);
    if (rc < 0)
        goto out;
    u = upload_new(site, &begin);
    if (u == NULL || !buffer_ok(&leaves)) {
        rc = error_set(err, ERR_RESOURCES, "no memory for an upload");
        goto out;
    }
    memcpy(u->leaves, leaves.data, leaves.len);
    rc = upload_path(folder, site, id, ".done", path, err);
    if (rc == 0 && file_exists(path)) {
        u->committed = true;
        u->held = u->chunks;
    } else if (rc == 0) {
        rc = upload_path(folder, site, id, ".part", path, err);
        if (rc == 0)
            rc = file_map(path, &map, err);
        if (rc == 0) {
            check_chunks(u, map);
            file_unmap(map);
        }
    }
out:
    buffer_release(&leaves);
    if (rc < 0)
        upload_free(u);
    else
        *ret = u;
    return rc;
}

bool upload_has(const struct upload *u, uint32_t index)
{
    return memcmp(u->leaves[index], none, HASH_SIZE) != 0;
}

int upload_put(const char *folder, struct upload *u, uint32_t index, struct span bytes, struct error *err)
{
    char path[SPOOL_PATH_SIZE];
    uint8_t leaf[HASH_SIZE];
    if (index >= u->chunks)
        return error_set(err, ERR_INTEGRITY, "chunk %u of an upload that has %u", index, u->chunks);
    if (bytes.len != chunk_length(&u->begin, index))
        return error_set(err, ERR_INTEGRITY, "chunk %u has %zu bytes, expected %zu", index, bytes.len,
                         chunk_length(&u->begin, index));
    merkle_leaf(bytes, leaf);
    if (upload_has(u, index)) {
        if (memcmp(leaf, u->leaves[index], HASH_SIZE) != 0)
            return error_set(err, ERR_INTEGRITY, "chunk %u was sent before with other bytes", index);
        return 0;
    }
    if (u->committed)
        return error_set(err, ERR_INTEGRITY, "the upload is already complete");
    int rc = upload_path(folder, u->site, &u->begin.id, ".part", path, err);
    if (rc < 0)
        return rc;
    int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return io_error(path, errno, err);
    int why = write_at(fd, bytes, (uint64_t)index * u->begin.chunk_bytes);
    close(fd);
    if (why < 0)
        return io_error(path, -why, err);
    /* The hash after the bytes; if a power cut reverses them on the disk, the check at the next start notices. */
    rc = upload_path(folder, u->site, &u->begin.id, ".map", path, err);
    if (rc < 0)
        return rc;
    fd = open(path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return io_error(path, errno, err);
    why = write_at(fd, span_of(leaf, HASH_SIZE), MAP_HEAD_BYTES + (uint64_t)index * HASH_SIZE);
    close(fd);
    if (why < 0)
        return io_error(path, -why, err);
    memcpy(u->leaves[index], leaf, HASH_SIZE);
    u->held++;
    return 0;
}

static int sync_path(const char *path, int flags, struct error *err)
{
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0)
        return io_error(path, errno, err);
    int rc = (flags & O_DIRECTORY ? fsync(fd) : fdatasync(fd)) < 0 ? io_error(path, errno, err) : 0;
    close(fd);
    return rc;
}

int upload_commit(const char *folder, struct upload *u, struct error *err)
{
    char part[SPOOL_PATH_SIZE], done[SPOOL_PATH_SIZE], map[SPOOL_PATH_SIZE];
    struct merkle tree;
    uint8_t root[HASH_SIZE];
    if (u->held < u->chunks)
        return error_set(err, ERR_AGAIN, "%u of %u chunks are still missing", u->chunks - u->held, u->chunks);
    merkle_init(&tree);
    for (uint32_t i = 0; i < u->chunks; i++)
        merkle_add_leaf(&tree, u->leaves[i]);
    merkle_root(&tree, root);
    if (memcmp(root, u->begin.root, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY, "the chunks received do not have the announced Merkle root");
    int rc = upload_path(folder, u->site, &u->begin.id, ".part", part, err);
    if (rc == 0)
        rc = upload_path(folder, u->site, &u->begin.id, ".done", done, err);
    if (rc == 0)
        rc = upload_path(folder, u->site, &u->begin.id, ".map", map, err);
    if (rc == 0)
        rc = sync_path(part, O_RDWR, err);
    if (rc == 0)
        rc = sync_path(map, O_RDWR, err);
    if (rc == 0 && rename(part, done) < 0)
        rc = io_error(done, errno, err);
    if (rc == 0) {
        *strrchr(done, '/') = '\0';
        rc = sync_path(done, O_RDONLY | O_DIRECTORY, err);
    }
    if (rc == 0)
        u->committed = u->verified = true;
    return rc;
}

int upload_verify(struct upload *u, struct span bytes, struct error *err)
{
    uint8_t root[TLS_HASH_BYTES];
    if (u->verified && bytes.len == u->begin.size_bytes)
        return 0;
    if (bytes.len == u->begin.size_bytes)
        transfer_root(bytes, u->begin.chunk_bytes, root);
    if (bytes.len != u->begin.size_bytes || memcmp(root, u->begin.root, sizeof root) != 0)
        return error_set(err, ERR_INTEGRITY, "the upload '%s' of %s, round %u, has changed on the disk",
                         u->begin.id.name, u->site, u->begin.id.round);
    u->verified = true;
    return 0;
}

int upload_unlink(const char *folder, const char *site, const struct transfer_id *id, struct error *err)
{
    static const char *const suffixes[] = {".map", ".part", ".done"};
    char path[SPOOL_PATH_SIZE];
    for (size_t i = 0; i < ARRAY_LEN(suffixes); i++) {
        int rc = upload_path(folder, site, id, suffixes[i], path, err);
        if (rc < 0)
            return rc;
        if (unlink(path) < 0 && errno != ENOENT)
            return io_error(path, errno, err);
    }
    *strrchr(path, '/') = '\0';
    rmdir(path); /* succeeds with the site's last upload only */
    return 0;
}
