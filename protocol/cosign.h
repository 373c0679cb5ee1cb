/*
 * Co-signatures: t sites vouch that a model follows from the previous one and from a sum they took part in.
 *
 * Statement = (federation, job, round, attempt, n, c, previous model hash, sum hash, H3, next model hash), label
 * "consilium/cosign/v1". A node signs it only inside secagg_client_on_result, after recomputing the server optimizer. A
 * site that missed a round accepts the next model only with a proof of at least t = quorum_threshold(n, c) distinct
 * rostered trainers: more than c, so at least one honest site checked it. Thread-safe.
 *
 *     cosign_collect(&collector, "clinic-b", signature, &err)  ...  cosign_proof(&collector, &bytes, &err)
 *     cosign_verify(proof, &roster, now_s, colluders_min, &statement, &err)
 */
#ifndef PROTOCOL_COSIGN_H
#define PROTOCOL_COSIGN_H

#include "base/reader.h"
#include "protocol/params.h"
#include "protocol/roster.h"

enum { COSIGN_PROOF_MAX = 64 << 10 };

struct cosign_statement {
    char federation[SITE_ID_SIZE];
    char job[SITE_ID_SIZE];
    uint32_t round, attempt;
    uint32_t n, c; /* invited; colluders assumed */
    uint8_t previous_hash[HASH_SIZE], sum_hash[HASH_SIZE], h3[HASH_SIZE], next_hash[HASH_SIZE];
};

/* Its fields in order; after decode, check r->failed. */
void cosign_statement_encode(const struct cosign_statement *s, struct buffer *b);
void cosign_statement_decode(struct reader *r, struct cosign_statement *s);

/* Signs for a site. Nodes get this through secagg_client_on_result only. */
void cosign_sign(const struct cosign_statement *s, const char *site, const struct sign_key *key,
                 uint8_t ret_signature[SIGN_SIZE]);

/* The aggregator's collection; zero it, then set statement and roster. */
struct cosign_collector {
    struct cosign_statement statement;
    const struct roster *roster; /* borrowed */
    int64_t now_s;
    uint32_t count;
    struct cosign_entry {
        char site[SITE_ID_SIZE];
        uint8_t signature[SIGN_SIZE];
    } entries[SECAGG_SITES_MAX];
};

/* ERR_INTEGRITY for a bad signature, ERR_POLICY for a site not admitted; a repeat of the same site is 0 and changes
 * nothing. */
int MUST_USE cosign_collect(struct cosign_collector *c, const char *site, const uint8_t signature[SIGN_SIZE],
                            struct error *err);
bool cosign_enough(const struct cosign_collector *c);
/* Appends the proof bytes; ERR_AGAIN while there are fewer than t. */
int MUST_USE cosign_proof(const struct cosign_collector *c, struct buffer *out, struct error *err);

/* Verifies untrusted proof bytes. colluders_min: the site's own least c (0: the default for the statement's n). The
 * caller compares previous_hash (when it holds the previous model), job, round, and next_hash with the model state it
 * received. ERR_INTEGRITY; ERR_POLICY when c is too low. */
int MUST_USE cosign_verify(struct span proof, const struct roster *roster, int64_t now_s, uint32_t colluders_min,
                           struct cosign_statement *ret_statement, struct error *err);

#endif
