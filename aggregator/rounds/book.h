/*
 * The aggregator's durable book of jobs, rounds and adapter versions: state/aggregator.sqlite, and the versions' states
 * as files under state/models/<job>/<round>.state (parameters, then server momentum, float32 little-endian).
 *
 * A round's number is written before its opening leaves and is never used again, so a restart aborts the round under
 * way and goes on with the next. A version is stored before it is announced. One thread; `job` commands of the command
 * line open the same file.
 */
#ifndef AGGREGATOR_ROUNDS_BOOK_H
#define AGGREGATOR_ROUNDS_BOOK_H

#include "base/buffer.h"
#include "protocol/cosign.h"
#include "protocol/job_plan.h"
#include "runtime/config.h"

struct book;

enum job_state { JOB_WAITING = 0, JOB_RUNNING = 1, JOB_DONE = 2, JOB_FAILED = 3, JOB_ABORTED = 4 };
const char *job_state_name(enum job_state state);

struct book_job {
    char job[SITE_ID_SIZE];
    enum job_state state;
    uint64_t words;
    uint32_t rounds_opened; /* the last round number used */
    uint32_t version;       /* round that made the newest version; 0: none */
    char reason[256];       /* of a failure or abort; "" */
};

int MUST_USE book_open(struct book **ret_book, const struct config *config, struct error *err);
void book_close(struct book *b);

/* ERR_EXISTS if the name was used. */
int MUST_USE book_add_job(struct book *b, const char *job, uint64_t words, struct span signed_plan, struct error *err);
int MUST_USE book_job(struct book *b, const char *job, struct book_job *ret_job, struct error *err); /* ERR_NOT_FOUND */
/* Its signed plan, appended to out. */
int MUST_USE book_plan(struct book *b, const char *job, struct buffer *out, struct error *err);
/* The running job, else the first waiting one. ERR_NOT_FOUND when there is nothing to do. */
int MUST_USE book_next_job(struct book *b, struct book_job *ret_job, struct error *err);
int MUST_USE book_set_state(struct book *b, const char *job, enum job_state state, const char *reason,
                            struct error *err);
int MUST_USE book_each_job(struct book *b, int (*visit)(void *ctx, const struct book_job *job), void *ctx,
                           struct error *err);
/* Takes the next round number for good. */
int MUST_USE book_open_round(struct book *b, const char *job, uint32_t *ret_round, struct error *err);

struct book_version {
    uint32_t round;
    uint32_t survivors;
    uint8_t model_hash[HASH_SIZE];
    uint8_t adapter_sha256[HASH_SIZE]; /* of the parameters' bytes */
    uint8_t state_sha256[HASH_SIZE];   /* of the state file */
    int64_t made_wall_ms;
    bool proven; /* a quorum has co-signed */
};
/* state: 2·words floats. Durable: file first, then the row and the job's version. */
int MUST_USE book_add_version(struct book *b, const char *job, const struct book_version *version, const float *state,
                              uint64_t words, struct error *err);
int MUST_USE book_set_proof(struct book *b, const char *job, uint32_t round, struct span proof, struct error *err);
/* Takes back versions that no quorum vouched for: nobody who missed one could ever verify it. The newest proven one (0:
 * none) is the job's version again, also in *job. */
int MUST_USE book_withdraw(struct book *b, struct book_job *job, struct error *err);
/* Appends the proof to out. ERR_NOT_FOUND: no such version, or not co-signed yet. */
int MUST_USE book_proof(struct book *b, const char *job, uint32_t round, struct buffer *out,
                        uint8_t ret_state_sha256[HASH_SIZE], struct error *err);
/* Reads a version's state into state (2·words floats), checking its hash. Round 0: zeros. */
int MUST_USE book_state(struct book *b, const char *job, uint32_t round, float *state, uint64_t words,
                        struct error *err);
/* The path of the proven state with this hash, of any job. path: AGGREGATOR_PATH_SIZE bytes. ERR_NOT_FOUND. */
int MUST_USE book_find_state(struct book *b, const uint8_t state_sha256[HASH_SIZE], char *path, struct error *err);
int MUST_USE book_each_version(struct book *b, const char *job,
                               int (*visit)(void *ctx, const struct book_version *version), void *ctx,
                               struct error *err);

#endif
