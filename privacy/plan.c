#include "privacy/plan.h"

#include "crypto/hash.h"
#include "privacy/accountant.h"
#include "privacy/sampler.h"

#include <inttypes.h>
#include <math.h>

#define PLAN_VERSION 1

uint64_t dp_plan_steps(const struct dp_plan *p)
{
    return (uint64_t)p->rounds * p->steps_per_round;
}

uint64_t dp_plan_variance(const struct dp_plan *p)
{
    /* z·grid_clip = m·2^e exactly, m of at most 53 + 32 bits cut to 64: all rounding goes up. */
    int e;
    unsigned __int128 m = (unsigned __int128)(uint64_t)ldexp(frexp(p->z, &e), 53) * p->grid_clip;
    e -= 53;
    while (m >> 63) {
        m = (m >> 1) + (m & 1);
        e++;
    }
    unsigned __int128 square = m * m;
    if (e >= 0)
        return e > 16 || square >> (63 - 2 * e) ? UINT64_MAX : (uint64_t)(square << 2 * e);
    if (-2 * e >= 127)
        return 1;
    unsigned __int128 whole = square >> (-2 * e), rest = square & (((unsigned __int128)1 << (-2 * e)) - 1);
    return whole >> 63 ? UINT64_MAX : (uint64_t)whole + (rest != 0);
}

double dp_plan_grid(const struct dp_plan *p)
{
    return (double)p->grid_clip / p->clip;
}

double dp_plan_clip(const struct dp_plan *p)
{
    return p->clip - sqrt((double)p->dimensions) / (2 * dp_plan_grid(p));
}

double dp_plan_denominator(const struct dp_plan *p)
{
    return p->q * (double)p->units;
}

int dp_plan_epsilon(const struct dp_plan *p, uint64_t steps, double *ret_epsilon, struct error *err)
{
    double order;
    if (p->mode == DP_NONE) {
        *ret_epsilon = INFINITY;
        return 0;
    }
    return accountant_epsilon(p->q, p->z, steps, p->delta, ret_epsilon, &order, err);
}

static int check_noise(const struct dp_plan *p, struct error *err)
{
    if (p->neighbour != DP_ADD_REMOVE)
        return error_set(err, ERR_CONFIG, "dp plan: neighbour relation %d: expected add/remove", (int)p->neighbour);
    if (!(p->q > 0 && p->q <= 1))
        return error_set(err, ERR_CONFIG, "dp plan: sampling rate %g: expected a number above 0 and at most 1", p->q);
    if (!(p->z >= 0.1 && p->z <= 1000))
        return error_set(err, ERR_CONFIG, "dp plan: noise multiplier %g: expected 0.1 to 1000", p->z);
    if (!(p->clip >= 1e-6 && p->clip <= 1e6))
        return error_set(err, ERR_CONFIG, "dp plan: clip %g: expected 1e-6 to 1e6", p->clip);
    if (p->grid_clip < 1u << 8 || p->grid_clip > 1u << 24)
        return error_set(err, ERR_CONFIG, "dp plan: %" PRIu32 " grid steps in the clip: expected 2^8 to 2^24",
                         p->grid_clip);
    if (dp_plan_variance(p) > NOISE_VARIANCE_MAX)
        return error_set(err, ERR_CONFIG, "dp plan: noise variance beyond 2^52 grid units: lower z or the grid");
    if (!(p->delta > 0 && p->delta < 1))
        return error_set(err, ERR_CONFIG, "dp plan: delta %g: expected a number between 0 and 1, such as 1e-5",
                         p->delta);
    if (p->units == 0 || p->units > UINT32_MAX)
        return error_set(err, ERR_CONFIG, "dp plan: %" PRIu64 " declared units: expected 1 to 2^32 - 1", p->units);
    if (p->delta * (double)p->units >= 1)
        return error_set(err, ERR_CONFIG, "dp plan: delta %g with %" PRIu64 " units: expected below 1/units = %.3g",
                         p->delta, p->units, 1 / (double)p->units);
    double loss = sqrt((double)p->dimensions) / 2, allowed = 0.05 * p->grid_clip;
    if (loss > allowed)
        return error_set(err, ERR_CONFIG,
                         "dp plan: rounding %" PRIu64 " parameters costs %.2g of the clip, more than 0.05: send fewer "
                         "parameters or raise the grid to at least %.0f",
                         p->dimensions, loss / p->grid_clip, ceil(loss / 0.05));
    if (!(p->epsilon > 0 && p->epsilon <= 1000))
        return error_set(err, ERR_CONFIG, "dp plan: target epsilon %g: expected above 0 and at most 1000", p->epsilon);
    return 0;
}

int dp_plan_check_ranges(const struct dp_plan *p, struct error *err)
{
    if (p->mode != DP_NONE && p->mode != DP_RECORD)
        return error_set(err, ERR_CONFIG, "dp plan: mode %d: expected none or record", (int)p->mode);
    if (p->steps_per_round == 0 || p->steps_per_round > 1000000 || p->rounds == 0 || p->rounds > 1000000)
        return error_set(err, ERR_CONFIG,
                         "dp plan: %" PRIu32 " rounds of %" PRIu32 " steps: expected 1 to 1000000 of both", p->rounds,
                         p->steps_per_round);
    if (p->dimensions == 0 || p->dimensions > UINT32_MAX)
        return error_set(err, ERR_CONFIG, "dp plan: %" PRIu64 " dimensions: expected 1 to 2^32 - 1", p->dimensions);
    if (memchr(p->unit, 0, sizeof p->unit) == NULL || (p->mode != DP_NONE && p->unit[0] == 0))
        return error_set(err, ERR_CONFIG, "dp plan: privacy unit: expected \"record\" or the name of a key field");
    return p->mode == DP_NONE ? 0 : check_noise(p, err);
}

int dp_plan_check(const struct dp_plan *p, struct error *err)
{
    double epsilon;
    int rc = dp_plan_check_ranges(p, err);
    if (rc < 0 || p->mode == DP_NONE)
        return rc;
    rc = dp_plan_epsilon(p, dp_plan_steps(p), &epsilon, err);
    if (rc < 0)
        return rc;
    /* A calibrated z meets the target up to the bisection's last digits. */
    if (epsilon > p->epsilon * (1 + 1e-6))
        return error_set(err, ERR_CONFIG,
                         "dp plan: %" PRIu64
                         " steps at rate %g with noise %g spend epsilon %.4f at delta %g, more than the "
                         "target %g: raise the noise or do fewer steps",
                         dp_plan_steps(p), p->q, p->z, epsilon, p->delta, p->epsilon);
    return 0;
}

void dp_plan_encode(const struct dp_plan *p, struct buffer *out)
{
    buffer_u8(out, PLAN_VERSION);
    buffer_u8(out, (uint8_t)p->mode);
    buffer_u8(out, (uint8_t)p->neighbour);
    buffer_string(out, p->unit);
    buffer_f64(out, p->q);
    buffer_f64(out, p->z);
    buffer_f64(out, p->clip);
    buffer_u32(out, p->grid_clip);
    buffer_u32(out, p->steps_per_round);
    buffer_u32(out, p->rounds);
    buffer_f64(out, p->delta);
    buffer_f64(out, p->epsilon);
    buffer_u64(out, p->units);
    buffer_u64(out, p->dimensions);
}

void dp_plan_decode(struct reader *r, struct dp_plan *ret_plan)
{
    struct dp_plan p = {0};
    uint8_t version = reader_u8(r), mode = reader_u8(r), neighbour = reader_u8(r);
    p.mode = mode == DP_RECORD ? DP_RECORD : DP_NONE;
    p.neighbour = DP_ADD_REMOVE;
    struct span unit = reader_bytes(r, sizeof p.unit - 1);
    if (unit.len > 0)
        memcpy(p.unit, unit.ptr, unit.len);
    p.q = reader_f64(r);
    p.z = reader_f64(r);
    p.clip = reader_f64(r);
    p.grid_clip = reader_u32(r);
    p.steps_per_round = reader_u32(r);
    p.rounds = reader_u32(r);
    p.delta = reader_f64(r);
    p.epsilon = reader_f64(r);
    p.units = reader_u64(r);
    p.dimensions = reader_u64(r);
    bool plain = unit.len == 0 || memchr(unit.ptr, 0, unit.len) == NULL;
    if (version != PLAN_VERSION || mode > DP_RECORD || neighbour != DP_ADD_REMOVE || !plain)
        r->failed = true;
    if (!r->failed)
        *ret_plan = p;
}

void dp_plan_hash(const struct dp_plan *p, uint8_t out[DP_HASH_SIZE])
{
    struct buffer b;
    buffer_init(&b, 512);
    dp_plan_encode(p, &b);
    assert(buffer_ok(&b));
    struct span encoding = buffer_span(&b);
    hash_labelled("consilium/dp-plan", &encoding, 1, out);
    buffer_release(&b);
}
