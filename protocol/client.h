/*
 * One attempt of secure aggregation at a site. Sans-I/O: messages in, messages out.
 *
 * Created from M0 only after every check of the site's own rules; each step then checks what the aggregator says
 * against what the peers signed. Order is enforced: a call out of order is ERR_FAILED, a repeated call with identical
 * input returns the stored answer, a different input at a passed stage is equivocation (ERR_INTEGRITY) and kills the
 * attempt. An attempt that failed a check of the aggregator's messages is dead: every later call says so and nothing
 * more is signed or opened. Secrets live in crypto/secret memory, are wiped at last use and in secagg_client_free.
 * Returned spans are borrowed from the client. One thread at a time.
 *
 *     secagg_client_new(&c, &config, m0, &err)        M0   verifies all, records (job, round, attempt) durably
 *     secagg_client_set_ledger(c, sequence, head)          after the reservation of the budget, before M1
 *     secagg_client_advertise(c, &m1, &err)           M1   after training, with the noised update durable
 *     secagg_client_on_keys(c, m2, &m3, &err)         M2 -> M3
 *     secagg_client_on_deliver(c, m4, &err)           M4
 *     secagg_client_mask(c, ring, root, &m5, &err)    M5   ring (d) becomes the masked vector, in place, once
 *     secagg_client_on_survivors(c, m6, &m7, &err)    M6 -> M7, H3 recorded before signing
 *     secagg_client_on_quorum(c, m8, &m9, &err)       M8 -> M9, recorded before it is returned
 *     secagg_client_on_result(c, m10, &input, &out, &err)    M10: next model recomputed, co-signature
 *     secagg_client_free(c)
 *
 * The masked vector leaves as little-endian words in chunks of secagg_client_info(c)->chunk_bytes; `root` is their
 * Merkle tree (crypto/merkle.h, one leaf a chunk), the same that protocol/transport/transfer.h takes.
 */
#ifndef PROTOCOL_CLIENT_H
#define PROTOCOL_CLIENT_H

#include "protocol/cosign.h"
#include "protocol/job_plan.h"
#include "protocol/record.h"

struct secagg_client;

/* A site's own floors. Zero means the default for the n invited. What the roster asks for holds as well. */
struct secagg_policy {
    uint32_t sites_min;     /* least n invited and least n_min (min_cohort) */
    uint32_t colluders_min; /* least c */
    uint32_t honest_min;    /* least m */
    bool allow_no_dp;       /* plan with dp mode none */
};

struct secagg_client_config {
    const char *site_id;
    const struct sign_key *identity; /* identity_sign_key(); borrowed for the client's life */
    const struct roster *roster;     /* borrowed for the client's life */
    struct secagg_policy policy;
    const uint8_t *plan_hash;      /* (32) the consented plan */
    const uint8_t *model_hash;     /* (32) of the model state this site holds and will train from */
    uint64_t words;                /* of the model state, as this site computes it from the LoRA configuration */
    struct secagg_log log;         /* durable records, see record.h */
    struct secagg_witness witness; /* peers' ledger heads; check may be NULL */
    const struct rng *rng;         /* random_system; borrowed for the client's life */
    int64_t now_s;                 /* UTC, for certificates, roster and plan */
};

/* What M0 said, verified. */
struct secagg_info {
    char job[SITE_ID_SIZE];
    uint32_t round, attempt;
    struct quorum quorum;
    uint32_t clamp; /* M */
    uint32_t chunk_bytes;
    uint64_t state_words; /* of the model state, as M0 says */
    uint64_t offset;      /* where the round's vector lies in the state, and */
    uint64_t words;       /* d, its length: of the ring vector, the masks, the upload and the sum */
    uint8_t h0[HASH_SIZE];
    uint8_t model_hash[HASH_SIZE];
    struct job_plan plan;
    uint32_t survivors; /* |U3|, 0 before M6 */
};

/* The checks of M0 and the OPEN record. ERR_POLICY: the site's rules; ERR_INTEGRITY: signatures, hashes, replay. */
int MUST_USE secagg_client_new(struct secagg_client **ret_client, const struct secagg_client_config *config,
                               struct span m0, struct error *err);
void secagg_client_free(struct secagg_client *c); /* wipes; accepts NULL */
const struct secagg_info *secagg_client_info(const struct secagg_client *c);
/* Peeks at an unverified M0 (before training): signature of the aggregator and plan are verified, nothing is recorded.
 */
int MUST_USE secagg_peek(struct span m0, const struct roster *roster, struct secagg_info *ret_info, struct error *err);

/* The head of this site's privacy ledger, which M1 shows to the peers as witnesses; zeros unless set. Budget is
 * reserved only after secagg_client_new: a round that the site's rules refuse must cost nothing. */
void secagg_client_set_ledger(struct secagg_client *c, uint64_t sequence, const uint8_t head[HASH_SIZE]);
int MUST_USE secagg_client_advertise(struct secagg_client *c, struct span *ret_m1, struct error *err);
int MUST_USE secagg_client_on_keys(struct secagg_client *c, struct span m2, struct span *ret_m3, struct error *err);
int MUST_USE secagg_client_on_deliver(struct secagg_client *c, struct span m4, struct error *err);
/* ring: (words), the clamped update in Z_2^32 (quantise_update); masked in place. Once: a second call returns the
 * stored M5 and leaves ring alone. */
int MUST_USE secagg_client_mask(struct secagg_client *c, uint32_t *ring, uint8_t ret_root[HASH_SIZE],
                                struct span *ret_m5, struct error *err);
int MUST_USE secagg_client_on_survivors(struct secagg_client *c, struct span m6, struct span *ret_m7,
                                        struct error *err);
int MUST_USE secagg_client_on_quorum(struct secagg_client *c, struct span m8, struct span *ret_m9, struct error *err);

struct secagg_result_in {
    const uint32_t *sum;            /* (words) the fetched ring sum */
    uint8_t frozen_hash[HASH_SIZE]; /* of the frozen A, for the model hash */
    struct model_state previous;    /* (state_words) must hash to the attempt's model hash */
    float *next_params;             /* (state_words) written; meaningless after an error */
    float *next_momentum;           /* (state_words) */
};
struct secagg_result_out {
    struct cosign_statement statement;
    uint8_t signature[SIGN_SIZE]; /* the site's co-signature: SESSION_COSIGN's payload */
};
int MUST_USE secagg_client_on_result(struct secagg_client *c, struct span m10, const struct secagg_result_in *in,
                                     struct secagg_result_out *ret_out, struct error *err);

#endif
