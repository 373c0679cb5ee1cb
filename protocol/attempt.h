/*
 * Inside the protocol library: what both ends know of one attempt, and the encodings they share. Not for the daemons.
 *
 * Node messages:         u8 stage || previous H (32) || body || signature (64)
 *                        label "consilium/m<stage>", parts (site id, previous H, what the stage says is signed)
 * Aggregator broadcasts: u8 stage || previous H (32; M0: none) || body || signature (64) "consilium/broadcast"
 * Members are the invited sites sorted by id; U1, U2 and U3 are flags on them, each a subset of the one before.
 */
#ifndef PROTOCOL_ATTEMPT_H
#define PROTOCOL_ATTEMPT_H

#include "base/buffer.h"
#include "base/reader.h"
#include "crypto/agree.h"
#include "crypto/hash.h"
#include "crypto/mask.h"
#include "crypto/merkle.h"
#include "crypto/seal.h"
#include "crypto/secret.h"
#include "crypto/shamir.h"
#include "protocol/client.h"
#include "protocol/server.h"

enum {
    MESSAGE_MAX = 8 << 20,
    CHUNK_BYTES_MAX = 4 << 20,
    WORDS_MAX = PLAN_WORDS_MAX,
    STAGES = 11,
    SHARE_PLAIN_BYTES = 2 * SITE_ID_SIZE + 4 + 2 * SHAMIR_SIZE, /* from, to (zero padded), index, share of b, of s */
    SHARE_SEALED_BYTES = SHARE_PLAIN_BYTES + SEAL_TAG_SIZE,
    GRAPH_COMPLETE = 1,
};
#define MASK_VECTOR "main"

struct member {
    char id[SITE_ID_SIZE];
    const struct roster_site *site;
    bool u1, u2, u3;
    uint32_t index; /* Shamir index: position in U1, from 1 */
    struct buffer advert;
    uint8_t channel_public[AGREE_SIZE], mask_public[AGREE_SIZE], commitment[HASH_SIZE];
    uint64_t ledger_sequence;
    uint8_t ledger_head[HASH_SIZE];
    uint8_t share_root[HASH_SIZE], share_signature[SIGN_SIZE];
    uint8_t vector_root[HASH_SIZE], vector_signature[SIGN_SIZE];
};

struct attempt {
    const struct roster *roster;
    int64_t now_s;
    struct secagg_info info;
    uint8_t nonce[HASH_SIZE];
    uint32_t suite;
    struct member *members; /* (info.quorum.n), owned */
    uint8_t h1[HASH_SIZE], h2[HASH_SIZE], h3[HASH_SIZE];
};

void attempt_release(struct attempt *a);
/* NULL: not invited. */
struct member *attempt_find(struct attempt *a, const char *id);
uint32_t attempt_count_u1(const struct attempt *a);
uint32_t attempt_count_u2(const struct attempt *a);
uint32_t attempt_count_u3(const struct attempt *a);
/* Reads an id of a list that must be sorted and of members in `set` (1, 2, 3; 0: any member). NULL on failure. */
struct member *attempt_read_member(struct attempt *a, struct reader *in, const char **previous, int set);
void attempt_h1(struct attempt *a);
void attempt_h2(struct attempt *a);
void attempt_h3(struct attempt *a);

/* Signature of a node over what a stage signs. */
void stage_sign(int stage, const char *site, const uint8_t previous[HASH_SIZE], struct span content,
                const struct sign_key *key, uint8_t out[SIGN_SIZE]);
int MUST_USE stage_verify(int stage, const struct member *m, const uint8_t previous[HASH_SIZE], struct span content,
                          const uint8_t signature[SIGN_SIZE], struct error *err);
/* Head of a node message or broadcast: stage and previous hash. ret_in stands after it and before the signature. */
int MUST_USE message_open(int stage, const uint8_t previous[HASH_SIZE], struct span message, struct reader *ret_in,
                          const uint8_t **ret_signature, struct error *err);
void message_begin(struct buffer *b, int stage, const uint8_t previous[HASH_SIZE]);
void broadcast_end(struct buffer *b, const struct sign_key *aggregator);
/* message_open and the aggregator's signature. */
int MUST_USE broadcast_open(const struct attempt *a, int stage, const uint8_t previous[HASH_SIZE], struct span message,
                            struct reader *ret_in, struct error *err);

/* M0, read and checked on its own: signatures, plan, arithmetic. */
int MUST_USE open_read(struct attempt *ret_a, const struct roster *roster, struct span m0, struct error *err);
/* M1: verified against the roster; fills m. */
int MUST_USE advert_read(const struct attempt *a, struct member *m, struct span m1, int64_t now_s, struct error *err);
void advert_commitment(const uint8_t h0[HASH_SIZE], const char *id, const uint8_t b[SHAMIR_SIZE],
                       uint8_t out[HASH_SIZE]);
void advert_mask_key(struct agree_key *key, const uint8_t h0[HASH_SIZE], const char *id, const uint8_t s[SHAMIR_SIZE]);
/* M3 */
void share_hash(const char *kind, const char *from, const char *to, const uint8_t share[SHAMIR_SIZE],
                uint8_t out[HASH_SIZE]);
void share_leaf(const char *to, struct span sealed, const uint8_t hash_b[HASH_SIZE], const uint8_t hash_s[HASH_SIZE],
                uint8_t out[HASH_SIZE]);
void share_channel_key(const struct attempt *a, const uint8_t shared[AGREE_SIZE], const char *from, const char *to,
                       uint8_t out[SEAL_KEY_SIZE]);
/* The client's M3, into c->out[3]. */
int MUST_USE shares_make(struct secagg_client *c, struct error *err);
/* H1 || from || to: 32 + 2 * 64 bytes. */
void share_aad(const struct attempt *a, const char *from, const char *to, uint8_t out[HASH_SIZE + 2 * SITE_ID_SIZE]);
/* The client's M7 and M9: recorded first, into c->out. */
int MUST_USE consistency_sign(struct secagg_client *c, struct error *err);
int MUST_USE unmask_answer(struct secagg_client *c, struct error *err);
/* M5 */
void vector_merkle_root(const struct attempt *a, const uint8_t *bytes, uint8_t out[HASH_SIZE]);
void sum_hash(const uint32_t *sum, uint64_t words, uint8_t out[HASH_SIZE]);

/* The site's end. */
struct client_secrets {
    uint8_t s[SHAMIR_SIZE], b[SHAMIR_SIZE];
    struct agree_key channel, mask;
    uint8_t held_b[SECAGG_SITES_MAX][SHAMIR_SIZE], held_s[SECAGG_SITES_MAX][SHAMIR_SIZE]; /* by member */
    uint8_t dealt_b[SECAGG_SITES_MAX][SHAMIR_SIZE], dealt_s[SECAGG_SITES_MAX][SHAMIR_SIZE];
    uint8_t scratch[SHARE_PLAIN_BYTES], shared[AGREE_SIZE], key[MASK_KEY_SIZE];
};

struct secagg_client {
    struct attempt a;
    struct member *own;
    const struct sign_key *identity;
    struct secagg_log log;
    struct secagg_witness witness;
    const struct rng *rng;
    uint64_t ledger_sequence;
    uint8_t ledger_head[HASH_SIZE];
    struct client_secrets *secret;
    bool dead;
    int next;          /* stage whose input is expected */
    bool seen[STAGES]; /* by stage of the input */
    uint8_t input_hash[STAGES][HASH_SIZE];
    struct buffer out[STAGES]; /* stored answers, by their own stage */
};

/* Before the work of a stage: 1 = replay of the same input (the stored answer stands), 0 = go on, negative = refused.
 */
int MUST_USE client_enter(struct secagg_client *c, int stage, struct span input, struct error *err);
/* After it: rc < 0 kills the attempt and wipes; 0 notes the input and moves on. Returns rc. */
int MUST_USE client_leave(struct secagg_client *c, int stage, struct span input, int next, int rc);

/* The aggregator's end. */
struct server_member {
    bool answered; /* the stage being collected */
    uint8_t answer_hash[STAGES][HASH_SIZE];
    bool answer_seen[STAGES];
    struct buffer sealed;            /* (n, SHARE_SEALED_BYTES) of M3, own slot unused */
    uint8_t (*hash_b)[HASH_SIZE];    /* (n) of M3 */
    uint8_t (*hash_s)[HASH_SIZE];    /* (n) */
    uint8_t (*leaves)[HASH_SIZE];    /* (|U1|) merkle leaves */
    bool masked, added;              /* M5 in; vector added */
    uint8_t signature_h3[SIGN_SIZE]; /* M7 */
    uint8_t (*shares)[SHAMIR_SIZE];  /* (n) of M9, secret memory */
    struct buffer deliver;           /* its M4 */
};

struct secagg_server {
    struct attempt a;
    const struct sign_key *identity;
    enum secagg_stage stage;
    struct server_member *members;   /* (n) */
    struct buffer broadcast[STAGES]; /* M0, M2, M6, M8, M10 */
    uint32_t *sum;                   /* (words) the accumulator */
};

int MUST_USE advertise_receive(struct secagg_server *s, uint32_t i, struct span message, struct error *err);
int MUST_USE keys_close(struct secagg_server *s, struct error *err);
int MUST_USE shares_receive(struct secagg_server *s, uint32_t i, struct span message, struct error *err);
int MUST_USE deliver_close(struct secagg_server *s, struct error *err);
int MUST_USE masked_receive(struct secagg_server *s, uint32_t i, struct span message, struct error *err);
int MUST_USE survivors_close(struct secagg_server *s, struct error *err);
int MUST_USE consistency_receive(struct secagg_server *s, uint32_t i, struct span message, struct error *err);
int MUST_USE quorum_close(struct secagg_server *s, struct error *err);
int MUST_USE unmask_receive(struct secagg_server *s, uint32_t i, struct span message, struct error *err);
int MUST_USE unmask_close(struct secagg_server *s, struct error *err);

#endif
