/*
 * A federation in one process: governance, roster, plan, n sites with their memories, one aggregator, real keys and
 * masks. A test drives the stages and may sit between them as a malicious aggregator (it holds the aggregator's key).
 */
#ifndef TESTS_SIM_H
#define TESTS_SIM_H

#include "crypto/random.h"
#include "protocol/attempt.h"

enum { SIM_SITES = 32 };

struct sim_site {
    char id[SITE_ID_SIZE];
    struct sign_key key;
    uint32_t open_round, open_attempt; /* the durable records */
    uint8_t h3[HASH_SIZE], m9[HASH_SIZE];
    bool has_h3, has_m9;
    uint8_t unmasked_model[HASH_SIZE]; /* of a round without DP */
    uint32_t unmasked_round;           /* 0: none */
    uint64_t witness_sequence;         /* what this site saw of the others at most */
    uint64_t ledger_sequence;
    struct secagg_client *client;
    uint32_t *plain, *masked; /* (words), of which the round's vector are the first */
};

struct sim {
    struct random_stream stream;
    struct rng rng;
    struct sign_key governance, author, aggregator;
    struct roster roster;
    struct job_plan plan;
    struct buffer signed_roster, signed_plan;
    uint32_t n, round, attempt, suite;
    size_t words;
    int64_t now_s;
    uint8_t model_hash[HASH_SIZE], frozen_hash[HASH_SIZE];
    float *params, *momentum;
    struct secagg_policy policy;
    struct sim_site sites[SIM_SITES];
    struct secagg_server *server;
    struct error err;
};

uint64_t sim_seed(void); /* CONSILIUM_SEED or 1; printed once */
void sim_init(struct sim *s, uint32_t n, size_t words, uint64_t seed);
/* The same for a job that trains the state's first `split` words and the rest in turn; 0: the whole of it. */
void sim_init_split(struct sim *s, uint32_t n, size_t words, size_t split, uint64_t seed);
/* What the present round moves of the state. */
struct model_segment sim_segment(const struct sim *s);
void sim_release(struct sim *s);
/* A new attempt: the server and M0 to every site in `alive`; returns the first site's error or 0. */
int sim_open_server(struct sim *s);
int sim_join(struct sim *s, uint32_t i, struct span m0);
int sim_sites_join(struct sim *s);
void sim_drop_clients(struct sim *s);
/* Runs one collected stage for all sites of the mask `alive` (bit i), then closes it. Returns close_stage's result. */
int sim_stage(struct sim *s, uint64_t alive);
/* Feeds the site the broadcast of the present stage and returns its answer. */
int sim_answer(struct sim *s, uint32_t i, struct span broadcast, struct span *ret_answer);
/* Copies a broadcast, drops its signature, so that the test may change it and sim_resign it. */
void sim_copy_body(struct buffer *out, struct span broadcast);
void sim_resign(struct sim *s, struct buffer *b);

#endif
