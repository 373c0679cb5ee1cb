/*
 * A site's privacy budget, on disk: append-only hash-chained rows in SQLite, spent before anything is sampled.
 *
 * Invariants: a reservation is durable (synchronous=FULL) before ledger_reserve returns; rows are only ever appended;
 * reserved, released and burnt all count as spent (no refunds: a crash is spent); a job's step numbers strictly grow;
 * the spent RDP at the ledger's order never exceeds the budget, which is the lesser of the last budget row and of what
 * this struct ledger was opened with: a row that another process appends can lower the budget of a running one, never
 * raise it.
 *
 * The filter. Plans come one after another and may depend on what was released, so ε is not the minimum over orders.
 * The ledger uses the fully adaptive Rényi filter (Feldman and Zrnic, "Individual Privacy Accounting via a Rényi
 * Filter", 2021) at ONE order α, fixed in row 0: spend while the sum of ε(α) ≤ budget − log(1 − 1/α) + log(δα)/(α − 1).
 * α is chosen to admit the most steps of the expected plan when one is given, otherwise of small Gaussian steps; so a
 * ledger made for its first job reports what the accountant reports for that job, and later, different jobs pay a
 * little more.
 *
 * One thread per struct ledger; several processes may race for one file, the database lock decides.
 *
 *     struct ledger_options o = {.site = "clinic-a", .epsilon = 8, .delta = 1e-5, .expected = &plan, .clock =
 * &clock_system}; rc = ledger_open(&l, path, &o, &err); rc = ledger_reserve(l, &request, &sequence, &err);      before
 * the first random number of the step
 *     ... train, noise, send ...
 *     rc = ledger_release(l, sequence, hash_of_update, &err); or ledger_burn
 */
#ifndef PRIVACY_LEDGER_H
#define PRIVACY_LEDGER_H

#include "base/clock.h"
#include "privacy/plan.h"

#define LEDGER_NAME_SIZE 128

struct ledger;

struct ledger_options {
    const char *site;               /* bound into row 0 */
    double epsilon;                 /* the site's budget; a change from the last one is appended as a row */
    double delta;                   /* fixed at creation; another value is refused */
    const struct dp_plan *expected; /* only when created: picks the order; NULL: from the budget alone */
    double order;                   /* only when created: overrides the choice; 0: choose */
    const struct clock *clock;
    bool must_exist; /* ERR_NOT_FOUND instead of creating */
    bool read_only;  /* must_exist, and no budget row is appended: nothing that is asked of it changes the file */
};

struct ledger_request {
    const char *job;
    const struct dp_plan *plan;
    uint64_t first_step; /* step numbers within the job, from 0; [first_step, first_step + steps) */
    uint32_t steps;
    uint8_t job_hash[DP_HASH_SIZE];    /* of the signed job */
    uint8_t dataset[DP_HASH_SIZE];     /* commitment under the site's key */
    uint8_t binary_hash[DP_HASH_SIZE]; /* zero when unknown */
};

enum ledger_kind {
    LEDGER_GENESIS = 1,
    LEDGER_BUDGET = 2,
    LEDGER_RESERVED = 3,
    LEDGER_RELEASED = 4,
    LEDGER_BURNT = 5,
};

struct ledger_row { /* what a report shows of one row */
    uint64_t sequence;
    enum ledger_kind kind;
    int64_t wall_ms;
    char job[LEDGER_NAME_SIZE]; /* RESERVED and its ends */
    struct dp_plan plan;        /* RESERVED only */
    uint64_t first_step;
    uint32_t steps;
    double rdp;           /* at the ledger's order; RESERVED */
    uint64_t reservation; /* RELEASED, BURNT: the row that they end */
    uint8_t released[DP_HASH_SIZE];
    char reason[LEDGER_NAME_SIZE]; /* BURNT */
    double epsilon;                /* GENESIS and BUDGET */
    uint8_t hash[DP_HASH_SIZE];
};

struct ledger_spent {
    double epsilon;       /* at delta and the ledger's order: what is enforced; 0 while nothing is spent */
    double epsilon_curve; /* least over all orders: exact when the plans were fixed in advance; information only */
    double budget;
    double delta;
    double order;
    double rdp, rdp_budget;
    uint64_t steps;
    uint64_t reserved, released, burnt; /* reservations by their present state */
};

struct ledger_head {
    uint64_t sequence;
    uint8_t hash[DP_HASH_SIZE];
};

/*
 * Opens or creates, and verifies the whole chain. ERR_INTEGRITY names the row that does not fit; ERR_CONFIG for options
 * that differ from row 0; ERR_POLICY when the budget is too small for any release at δ.
 */
int MUST_USE ledger_open(struct ledger **ret_ledger, const char *path, const struct ledger_options *options,
                         struct error *err);
void ledger_close(struct ledger *l);

/*
 * Spends, durably, before it returns. ERR_POLICY: over budget (spent, would be, budget in the message), a step number
 * that is not new, mode none. ERR_CONFIG: a plan out of range or not finite, or a plan or data set that differs from
 * what the job reserved under before; the data set may change. ERR_RESOURCES: the disk.
 */
int MUST_USE ledger_reserve(struct ledger *l, const struct ledger_request *request, uint64_t *ret_sequence,
                            struct error *err);
/* What ledger_reserve would say, without writing; ret_epsilon: the site's ε afterwards (also written when refused). */
int MUST_USE ledger_preview(struct ledger *l, const struct dp_plan *plan, uint64_t steps, double *ret_epsilon,
                            struct error *err);
/* Ends a reservation. ERR_POLICY when it has ended or does not exist; the same release twice (same hash) is 0. */
int MUST_USE ledger_release(struct ledger *l, uint64_t reservation, const uint8_t released[DP_HASH_SIZE],
                            struct error *err);
int MUST_USE ledger_burn(struct ledger *l, uint64_t reservation, const char *reason, struct error *err);
/* Burns every reservation without an end: at start-up, after a crash. */
int MUST_USE ledger_burn_open(struct ledger *l, const char *reason, uint32_t *ret_count, struct error *err);

/* job NULL: the whole site. An unknown job has spent nothing. */
int MUST_USE ledger_spent(struct ledger *l, const char *job, struct ledger_spent *ret_spent, struct error *err);
int MUST_USE ledger_head(struct ledger *l, struct ledger_head *ret_head, struct error *err);
/* ERR_INTEGRITY when this chain does not contain the head that a peer witnessed: an old copy or a fork. */
int MUST_USE ledger_expect(struct ledger *l, const struct ledger_head *witnessed, struct error *err);
/* The first step number that the job has not used; 0 for an unknown job. */
int MUST_USE ledger_next_step(struct ledger *l, const char *job, uint64_t *ret_step, struct error *err);

/* Re-reads every row: chain, encoding, RDP recomputed, states, budget. ERR_INTEGRITY names the row. */
int MUST_USE ledger_verify(struct ledger *l, struct error *err);
/* Rows from sequence `from`, in order; a visit that returns non-zero ends it with that value. */
int MUST_USE ledger_each(struct ledger *l, uint64_t from, int (*visit)(void *ctx, const struct ledger_row *row),
                         void *ctx, struct error *err);

#endif
