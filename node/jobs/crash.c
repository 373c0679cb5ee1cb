#include "node/jobs/crash.h"

#include "base/error.h"

#include <signal.h>
#include <unistd.h>

void crash_point(const char *name, uint64_t round)
{
    const char *at = getenv("CONSILIUM_CRASH_AT");
    size_t n = strlen(name);

    if (!at || strncmp(at, name, n) != 0)
        return;
    if (at[n] == ':' ? strtoull(at + n + 1, NULL, 10) != round : at[n] != 0)
        return;
    kill(getpid(), SIGKILL);
}
