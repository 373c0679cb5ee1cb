#include "crypto/secret.h"

#include "crypto/fatal.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

enum { SECRET_ALIGN = 64 };

void *secret_new(size_t bytes)
{
    size_t rounded;
    void *p;

    sodium_ready();
    /* sodium_malloc puts the object's end against the guard page, so only a rounded size keeps it aligned. */
    if (bytes > SIZE_MAX - SECRET_ALIGN)
        return NULL;
    rounded = (bytes + SECRET_ALIGN - 1) / SECRET_ALIGN * SECRET_ALIGN;
    p = sodium_malloc(rounded == 0 ? SECRET_ALIGN : rounded);
    if (p)
        memset(p, 0, rounded);
    return p;
}

void secret_free(void *p)
{
    if (p)
        sodium_free(p);
}

void secret_wipe(void *p, size_t bytes)
{
    sodium_memzero(p, bytes);
}

bool secret_equal(const void *a, const void *b, size_t bytes)
{
    return sodium_memcmp(a, b, bytes) == 0;
}

bool secret_is_zero(const void *p, size_t bytes)
{
    return sodium_is_zero(p, bytes) == 1;
}

bool secret_lockable(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool locked;

    if (p == MAP_FAILED)
        return false;
    locked = mlock(p, bytes) == 0;
    munmap(p, bytes);
    return locked;
}

int secret_forbid_dumps(struct error *err)
{
    const struct rlimit none = {0, 0};

    if (setrlimit(RLIMIT_CORE, &none) < 0)
        return error_set(err, ERR_RESOURCES, "cannot forbid core dumps: %s", strerror(errno));
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
        return error_set(err, ERR_RESOURCES, "cannot make the process undumpable: %s", strerror(errno));
    return 0;
}
