#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int errno_code(void)
{
    return errno == ENOENT ? ERR_NOT_FOUND : ERR_RESOURCES;
}

int file_read(const char *path, struct buffer *out, struct error *err)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int rc = 0;

    if (fd < 0)
        return error_set(err, errno_code(), "%s: cannot open: %s", path, strerror(errno));
    if (fstat(fd, &st) < 0 || S_ISDIR(st.st_mode)) {
        rc = error_set(err, ERR_CONFIG, "%s: not a file", path);
        goto out;
    }
    for (;;) {
        size_t before = out->len;
        uint8_t *at;
        ssize_t n;
        size_t want = 64 << 10;
        if (out->max - before < want)
            want = out->max - before + 1; /* one past the bound shows that the file is larger */
        at = buffer_extend(out, want > out->max - before ? out->max - before : want);
        if (!at && out->max > before) {
            rc = error_set(err, ERR_RESOURCES, "%s: out of memory", path);
            goto out;
        }
        if (out->max == before) {
            uint8_t extra;
            n = read(fd, &extra, 1);
            if (n == 0)
                goto out;
            rc = n < 0 ? error_set(err, ERR_RESOURCES, "%s: cannot read: %s", path, strerror(errno))
                       : error_set(err, ERR_RESOURCES, "%s: larger than the limit of %zu bytes", path, out->max);
            goto out;
        }
        n = read(fd, at, out->len - before);
        if (n < 0 && errno == EINTR)
            n = 0;
        else if (n <= 0) {
            out->len = before;
            if (n < 0)
                rc = error_set(err, ERR_RESOURCES, "%s: cannot read: %s", path, strerror(errno));
            goto out;
        }
        out->len = before + (size_t)n;
    }
out:
    close(fd);
    return rc;
}

static int write_all(int fd, struct span data)
{
    while (data.len > 0) {
        ssize_t n = write(fd, data.ptr, data.len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        data.ptr += n;
        data.len -= (size_t)n;
    }
    return 0;
}

static int sync_folder_of(const char *path)
{
    char folder[4096];
    char *slash;
    int fd, rc;

    snprintf(folder, sizeof folder, "%s", path);
    slash = strrchr(folder, '/');
    if (!slash)
        snprintf(folder, sizeof folder, ".");
    else
        slash[slash == folder] = 0;
    fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    rc = fsync(fd);
    close(fd);
    return rc;
}

int file_write_atomic(const char *path, struct span data, unsigned mode, struct error *err)
{
    char temporary[4096];
    int fd, rc = 0;

    if ((size_t)snprintf(temporary, sizeof temporary, "%s.tmp", path) >= sizeof temporary)
        return error_set(err, ERR_CONFIG, "%s: path too long", path);
    unlink(temporary);
    fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (fd < 0)
        return error_set(err, errno_code(), "%s: cannot create: %s", temporary, strerror(errno));
    if (write_all(fd, data) < 0 || fsync(fd) < 0)
        rc = error_set(err, ERR_RESOURCES, "%s: cannot write: %s", temporary, strerror(errno));
    if (close(fd) < 0 && rc == 0)
        rc = error_set(err, ERR_RESOURCES, "%s: cannot write: %s", temporary, strerror(errno));
    if (rc == 0 && (rename(temporary, path) < 0 || sync_folder_of(path) < 0))
        rc = error_set(err, ERR_RESOURCES, "%s: cannot rename into place: %s", path, strerror(errno));
    if (rc < 0)
        unlink(temporary);
    return rc;
}

int file_make_folder(const char *path, unsigned mode, struct error *err)
{
    char part[4096];
    struct stat st;

    if ((size_t)snprintf(part, sizeof part, "%s", path) >= sizeof part)
        return error_set(err, ERR_CONFIG, "%s: path too long", path);
    for (char *p = part + 1; *p; p++) {
        if (*p != '/')
            continue;
        *p = 0;
        if (mkdir(part, mode) < 0 && errno != EEXIST)
            return error_set(err, ERR_RESOURCES, "%s: cannot create folder: %s", part, strerror(errno));
        *p = '/';
    }
    if (mkdir(part, mode) < 0 && errno != EEXIST)
        return error_set(err, ERR_RESOURCES, "%s: cannot create folder: %s", part, strerror(errno));
    if (stat(part, &st) < 0 || !S_ISDIR(st.st_mode))
        return error_set(err, ERR_CONFIG, "%s: exists and is not a folder", part);
    return 0;
}

bool file_exists(const char *path)
{
    return access(path, F_OK) == 0;
}

int file_map(const char *path, struct span *ret_map, struct error *err)
{
    struct stat st;
    void *at;
    int rc = 0, fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* opening a pipe must not wait for its writer */

    if (fd < 0)
        return error_set(err, errno_code(), "%s: cannot open: %s", path, strerror(errno));
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        rc = error_set(err, ERR_CONFIG, "%s: not a file", path);
    } else if (st.st_size == 0) {
        *ret_map = span_of(NULL, 0);
    } else {
        at = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (at == MAP_FAILED)
            rc = error_set(err, ERR_RESOURCES, "%s: cannot map: %s", path, strerror(errno));
        else
            *ret_map = span_of(at, (size_t)st.st_size);
    }
    close(fd);
    return rc;
}

void file_unmap(struct span map)
{
    if (map.ptr)
        munmap((void *)(uintptr_t)map.ptr, map.len);
}

void file_map_rest(struct span map)
{
    if (map.ptr) /* never written, so that they come back as they were */
        (void)!madvise((void *)(uintptr_t)map.ptr, map.len, MADV_DONTNEED);
}

int file_lock(const char *path, int *ret_lock, struct error *err)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600), rc;

    if (fd < 0)
        return error_set(err, errno_code(), "%s: cannot open: %s", path, strerror(errno));
    do
        rc = flock(fd, LOCK_EX | LOCK_NB);
    while (rc < 0 && errno == EINTR);
    if (rc < 0) {
        rc = error_set(err, errno == EWOULDBLOCK ? ERR_AGAIN : ERR_RESOURCES, "%s: cannot lock: %s", path,
                       strerror(errno));
        close(fd);
        return rc;
    }
    *ret_lock = fd;
    return 0;
}

void file_unlock(int lock)
{
    if (lock >= 0)
        close(lock);
}

void file_join(char *out, size_t size, const char *folder, const char *name)
{
    int n = snprintf(out, size, "%s/%s", folder, name);
    assert(n >= 0 && (size_t)n < size);
    (void)n;
}
