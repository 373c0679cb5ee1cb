/*
 * The privacy plan of a job: what is sampled, clipped, rounded and noised, and over how many steps.
 *
 * All numbers are public. Integer units ("grid"): C is grid_clip steps, so g = grid_clip / C and σ² = ⌈(z·grid_clip)²⌉.
 * An example's gradient is clipped to dp_plan_clip(), then rounded per coordinate, so that its integer vector has L2
 * norm ≤ grid_clip. Plain value; no ownership.
 *
 *     struct dp_plan plan = {.mode = DP_RECORD, .neighbour = DP_ADD_REMOVE, .q = 0.04, .z = 1.2, .clip = 1.0,
 *                            .grid_clip = DP_GRID_CLIP, .steps_per_round = 5, .rounds = 20, .delta = 1e-5,
 *                            .epsilon = 8, .units = 2000, .dimensions = 460800};
 *     snprintf(plan.unit, sizeof plan.unit, "record");
 *     rc = dp_plan_check(&plan, &err);
 */
#ifndef PRIVACY_PLAN_H
#define PRIVACY_PLAN_H

#include "base/buffer.h"
#include "base/reader.h"

#define DP_GRID_CLIP ((uint32_t)1 << 20)
#define DP_UNIT_SIZE 64
#define DP_HASH_SIZE 32

enum dp_mode { DP_NONE = 0, DP_RECORD = 1 };
enum dp_neighbour { DP_ADD_REMOVE = 1 };

struct dp_plan {
    enum dp_mode mode;
    enum dp_neighbour neighbour;
    char unit[DP_UNIT_SIZE]; /* "record" or the key field, "patient_id" */
    double q;                /* Poisson rate per step, (0, 1] */
    double z;                /* noise multiplier */
    double clip;             /* C, L2 */
    uint32_t grid_clip;      /* g·C */
    uint32_t steps_per_round;
    uint32_t rounds;
    double delta;        /* δ, (0, 1) and < 1 / units */
    double epsilon;      /* target for all rounds; the plan must not exceed it */
    uint64_t units;      /* N, declared and public; the denominator is q·N */
    uint64_t dimensions; /* d, parameters sent */
};

/* Every range, the rounding loss √d/(2g) ≤ 0.05 C, the projected ε ≤ epsilon (with figures). ERR_CONFIG. */
int MUST_USE dp_plan_check(const struct dp_plan *p, struct error *err);
/* Ranges only, not the projected ε. */
int MUST_USE dp_plan_check_ranges(const struct dp_plan *p, struct error *err);

uint64_t dp_plan_steps(const struct dp_plan *p);     /* rounds · steps_per_round */
uint64_t dp_plan_variance(const struct dp_plan *p);  /* ⌈(z·grid_clip)²⌉, exact integer arithmetic */
double dp_plan_grid(const struct dp_plan *p);        /* g = grid_clip / C */
double dp_plan_clip(const struct dp_plan *p);        /* C − √d/(2g): clip before rounding to nearest */
double dp_plan_denominator(const struct dp_plan *p); /* q·N */
/* Projected ε at δ after `steps` steps (dp_plan_steps for all); INFINITY in mode none. */
int MUST_USE dp_plan_epsilon(const struct dp_plan *p, uint64_t steps, double *ret_epsilon, struct error *err);

/* Canonical encoding (base/buffer.h, fields in order, version byte first); decode refuses out-of-range enums. */
void dp_plan_encode(const struct dp_plan *p, struct buffer *out);
void dp_plan_decode(struct reader *r, struct dp_plan *ret_plan); /* failure is in r->failed */
/* Labelled hash (crypto/hash.h) "consilium/dp-plan" of the encoding. */
void dp_plan_hash(const struct dp_plan *p, uint8_t out[DP_HASH_SIZE]);

#endif
