/*
 * The signed job plan: everything that a site consents to, in one canonical encoding.
 *
 * Signed form: body || author key (32) || signature (64), label "consilium/plan/v2" over body. The author must be in
 * the roster. The plan hash covers the body; consent, the ledger, FFA's public seed and the protocol refer to it. Plain
 * values, no ownership: a struct job_plan may be copied. Thread-safe.
 *
 *     struct job_plan plan;
 *     if (job_plan_open(&plan, signed_bytes, &roster, &err) < 0) ...
 */
#ifndef PROTOCOL_JOB_PLAN_H
#define PROTOCOL_JOB_PLAN_H

#include "protocol/next_model.h"
#include "protocol/params.h"
#include "protocol/roster.h"

enum { PLAN_LORA_MAX = 1024, PLAN_TEXT_MAX = 2048, PLAN_BYTES_MAX = 8192, PLAN_ROUNDS_MAX = 100000 };
enum { PLAN_WORDS_MAX = 1 << 28 }; /* of a model state */

enum plan_dp_mode { PLAN_DP_NONE = 1, PLAN_DP_RECORD = 2 };

struct plan_train {
    char optimizer[16];          /* "adamw", "sgd": the node knows which */
    double learning_rate;        /* > 0 */
    uint32_t local_steps;        /* per round, >= 1 */
    uint32_t batch;              /* examples a step without DP; the declared q*N denominators are the node's; >= 1 */
    uint32_t max_len;            /* tokens */
    char options[PLAN_TEXT_MAX]; /* further settings as opaque text (system-message mode, ...); may be empty */
};

struct plan_dp {
    enum plan_dp_mode mode;
    /* The rest is 0 in mode none, but for the clip, which may still bound one record's gradient (0: no bound). */
    double clip; /* dp_clip C per unit */
    /* z, and q in (0, 1]; or both 0: each site takes q = batch / its declared records and the least z that keeps the
     * target over all steps. Its noise protects its own records only, so it need not be the same everywhere. */
    double noise_multiplier;
    double sampling_rate;
    double delta;          /* (0, 1) */
    double target_epsilon; /* > 0 */
    double grid;           /* g: integer steps per unit of gradient */
    uint64_t steps;        /* of the whole job: rounds * local_steps */
};

struct plan_aggregation {
    double update_clip; /* L2, > 0 */
    uint32_t ring_bits; /* 32 */
    uint32_t grid_bits; /* update grid: 2^grid_bits steps per unit, 1..GRID_BITS_MAX */
    struct server_optimizer optimizer;
};

struct job_plan {
    char job[SITE_ID_SIZE];
    uint8_t base_hash[HASH_SIZE]; /* SHA-256 of the base model file */
    uint8_t lora[PLAN_LORA_MAX];  /* opaque canonical encoding from model/lora */
    uint32_t lora_len;            /* >= 1 */
    /* 0: each round trains and sends the whole state. Else the state is cut here, for LoRA's factors in turn: the A
     * section is [0, split_words), the B section the rest (job_plan_segment). */
    uint64_t split_words;
    uint32_t rounds;    /* >= 1 */
    uint32_t min_sites; /* to open a round, >= 3 */
    struct plan_train train;
    struct plan_dp dp;
    struct plan_aggregation aggregation;
    uint32_t c, m, n_min;                        /* secure aggregation; 0: the default for the n invited */
    uint32_t train_deadline_s, stage_deadline_s; /* >= 1 */
    int64_t not_after_s;                         /* UTC since 1970 */

    uint8_t author[SIGN_PUBLIC_SIZE]; /* set by sign and open */
    uint8_t hash[HASH_SIZE];          /* of the body; set by sign and open */
};

/* Are all values in range and consistent? ERR_CONFIG names the field. */
int MUST_USE job_plan_check(const struct job_plan *p, struct error *err);
/* Checks, signs, appends the signed form to out, sets author and hash. */
int MUST_USE job_plan_sign(struct job_plan *p, const struct sign_key *author, struct buffer *out, struct error *err);
/* From untrusted bytes. ERR_INTEGRITY: malformed or bad signature. ERR_POLICY: the author is not in the roster. */
int MUST_USE job_plan_open(struct job_plan *ret_p, struct span signed_bytes, const struct roster *roster,
                           struct error *err);
/* What `round` (from 1) trains, sends and moves of a state of `words` values; both ends of the protocol ask here and
 * nowhere else. With a split: B in the odd rounds, A in the even ones. B first, since it starts at zero, where A has no
 * gradient. It hangs on the round's number alone, which everybody knows without any state: a round that is skipped
 * leaves its half for two rounds later. ERR_CONFIG: the split is not inside the state. */
int MUST_USE job_plan_segment(const struct job_plan *p, uint32_t round, uint64_t words,
                              struct model_segment *ret_segment, struct error *err);
/* The longest vector of any round: what privacy accounting takes as the number of dimensions. */
uint64_t job_plan_vector_max(const struct job_plan *p, uint64_t words);
/* What the plan's model is besides its state. lora is borrowed from p. */
struct model_basis job_plan_basis(const struct job_plan *p, const uint8_t frozen_hash[HASH_SIZE]);

#endif
