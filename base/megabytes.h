/*
 * Sizes of memory in messages: "7.3 MB", tenths below 10 MB, and never "0 MB" for something.
 *
 *     char want[MEGABYTES_SIZE], have[MEGABYTES_SIZE];
 *     error_set(err, ERR_RESOURCES, "%s do not fit into %s", megabytes(want, bytes), megabytes(have, room));
 */
#ifndef BASE_MEGABYTES_H
#define BASE_MEGABYTES_H

#include <stddef.h>
#include <stdio.h>

#define MEGABYTES_SIZE 32 /* of the text, NUL included */

static inline const char *megabytes(char out[MEGABYTES_SIZE], size_t bytes)
{
    const double mb = (double)bytes / (1 << 20);
    if (bytes > 0 && mb < 0.05)
        snprintf(out, MEGABYTES_SIZE, "under 0.1 MB");
    else
        snprintf(out, MEGABYTES_SIZE, "%.*f MB", bytes > 0 && mb < 9.95 ? 1 : 0, mb);
    return out;
}

#endif
