/*
 * Memory for keys: guard pages around it, locked against swap, left out of core dumps, wiped when freed.
 *
 * Allocation is libsodium's sodium_malloc (four pages an object at least, so keep one struct of secrets per attempt,
 * not one allocation per key). Where RLIMIT_MEMLOCK is too small the memory is still guarded, excluded from dumps and
 * wiped, only not locked; secret_lockable tells, so that a daemon can say so once at start. Any thread; objects are not
 * shared.
 *
 *     struct attempt_secrets *s = secret_new(sizeof *s);
 *     ...
 *     secret_free(s);
 */
#ifndef CRYPTO_SECRET_H
#define CRYPTO_SECRET_H

#include "base/error.h"
#include "base/span.h"

/* Zeroed, aligned for any object. NULL when memory runs out. */
void *secret_new(size_t bytes);
/* Wipes and frees; NULL is allowed. */
void secret_free(void *p);

void secret_wipe(void *p, size_t bytes);
/* Constant time in the contents. */
bool MUST_USE secret_equal(const void *a, const void *b, size_t bytes);
bool MUST_USE secret_is_zero(const void *p, size_t bytes);

/* True if `bytes` more can be locked now under RLIMIT_MEMLOCK. */
bool secret_lockable(size_t bytes);
/* No core dumps and no ptrace by other processes of the same user, from now on, children included (RLIMIT_CORE 0 and
 * PR_SET_DUMPABLE 0). Daemons call it first. */
int MUST_USE secret_forbid_dumps(struct error *err);

#endif
