/*
 * Quorum arithmetic: how many sites must survive, agree and answer.
 *
 * n sites are invited, c of the roster's sites may collude (a count), m honest sites at least must be in a sum. The
 * quorum t = floor((n + c)/2) + 1 makes 2t > n + c: no coalition gathers t shares of both secrets of a site, and two
 * survivor lists cannot both reach a quorum. Every node computes these itself; nothing here is taken from the
 * aggregator. Pure functions, thread-safe.
 *
 *     struct quorum q;
 *     if (quorum_derive(&q, 5, 0, 0, 0, &err) < 0) ...     // zeros: the defaults; q.t = 4, q.floor = 4
 */
#ifndef PROTOCOL_PARAMS_H
#define PROTOCOL_PARAMS_H

#include "base/error.h"

enum { SECAGG_SITES_MIN = 3, SECAGG_SITES_MAX = 200 }; /* complete graph */

struct quorum {
    uint32_t n;     /* sites invited */
    uint32_t c;     /* colluding sites assumed */
    uint32_t m;     /* honest sites wanted in every sum */
    uint32_t n_min; /* least survivors asked for */
    uint32_t t;     /* shares to reconstruct, signatures to agree */
    uint32_t floor; /* max(t, m + c, n_min): least sites at M4 and M6 */
};

uint32_t quorum_colluders_default(uint32_t n);     /* max(1, ceil(n/3) - 1) */
uint32_t quorum_honest_default(uint32_t n);        /* 3 from n = 5, else 2 */
uint32_t quorum_threshold(uint32_t n, uint32_t c); /* floor((n + c)/2) + 1 */

/* Zero for c, m or n_min means the default. ERR_CONFIG when n is out of range, m < 2, c >= n or the floor exceeds n. */
int MUST_USE quorum_derive(struct quorum *ret_q, uint32_t n, uint32_t c, uint32_t m, uint32_t n_min, struct error *err);

/* Largest |integer| a site may add so that n sites never wrap: floor((2^31 - 1 - ceil(12 sigma sqrt(n))) / n); 0 when
 * the noise leaves no room. sigma_local = 0 for updates whose noise is not added in the ring (`record` mode). */
uint32_t ring_clamp(uint32_t n, double sigma_local);

#endif
