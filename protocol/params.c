#include "protocol/params.h"

#include <math.h>

uint32_t quorum_colluders_default(uint32_t n)
{
    uint32_t c = n / 3 + (n % 3 != 0);

    return c > 2 ? c - 1 : 1;
}

uint32_t quorum_honest_default(uint32_t n)
{
    return n >= 5 ? 3 : 2;
}

uint32_t quorum_threshold(uint32_t n, uint32_t c)
{
    return (uint32_t)(((uint64_t)n + c) / 2 + 1);
}

static uint32_t max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

int quorum_derive(struct quorum *ret_q, uint32_t n, uint32_t c, uint32_t m, uint32_t n_min, struct error *err)
{
    struct quorum q = {.n = n};

    if (n < SECAGG_SITES_MIN || n > SECAGG_SITES_MAX)
        return error_set(err, ERR_CONFIG, "secure aggregation needs %d to %d sites, %u are invited", SECAGG_SITES_MIN,
                         SECAGG_SITES_MAX, n);
    q.c = c ? c : quorum_colluders_default(n);
    q.m = m ? m : quorum_honest_default(n);
    if (q.c >= n || q.m > n)
        return error_set(err, ERR_CONFIG, "%u colluders and %u honest sites do not fit into %u sites", q.c, q.m, n);
    if (q.m < 2)
        return error_set(err, ERR_CONFIG, "a sum of fewer than 2 honest sites shows a single site's update");
    q.t = quorum_threshold(n, q.c);
    q.n_min = n_min ? n_min : max_u32(q.t, q.m + q.c);
    q.floor = max_u32(max_u32(q.t, q.m + q.c), q.n_min);
    if (q.floor > n)
        return error_set(err, ERR_CONFIG,
                         "%u sites cannot reach the floor of %u survivors (quorum %u, %u honest + %u colluders, "
                         "n_min %u): invite more sites or assume fewer colluders",
                         n, q.floor, q.t, q.m, q.c, q.n_min);
    *ret_q = q;
    return 0;
}

uint32_t ring_clamp(uint32_t n, double sigma_local)
{
    assert(n > 0 && sigma_local >= 0);
    double room = 2147483647.0 - ceil(12.0 * sigma_local * sqrt((double)n));

    return room < n ? 0 : (uint32_t)floor(room / n);
}
