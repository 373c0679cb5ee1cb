/*
 * The roster: who belongs to the federation, signed by the offline governance key that every node pins at enrolment.
 *
 * A CA signature alone never admits a site; this list does. It is replaced only by one whose serial is the next and
 * whose previous hash is the current one's: a lower or forked serial is refused. Sites are sorted by id (bytewise), ids
 * are 1 to 63 of [a-z0-9-], certificates and keys are unique. The signed form is: body || 64-byte governance signature
 * ("consilium/roster/v1" over the body). Immutable after opening; shareable.
 *
 *     struct roster r = {0};
 *     if (roster_open(&r, signed_bytes, governance_public, &err) < 0 || roster_check_time(&r, now_s, &err) < 0) ...
 *     const struct roster_site *site = roster_find(&r, "clinic-a");
 *     roster_release(&r);
 */
#ifndef PROTOCOL_ROSTER_H
#define PROTOCOL_ROSTER_H

#include "base/buffer.h"
#include "crypto/hash.h"
#include "crypto/sign.h"

enum { SITE_ID_SIZE = 64, ROSTER_SITES_MAX = 1024, ROSTER_AUTHORS_MAX = 64, ROSTER_BYTES_MAX = 1 << 20 };

enum site_role { SITE_TRAINER = 1, SITE_EVALUATOR = 2 };

struct roster_site {
    char id[SITE_ID_SIZE];
    uint8_t certificate_hash[HASH_SIZE]; /* SHA-256 of the DER: certificate_fingerprint */
    uint8_t public_key[SIGN_PUBLIC_SIZE];
    int64_t certificate_not_after_s; /* UTC since 1970; adverts of an expired certificate are refused */
    enum site_role role;
};

struct roster {
    char federation[SITE_ID_SIZE];
    uint64_t serial;                   /* from 1 */
    uint8_t previous_hash[HASH_SIZE];  /* zeros for serial 1 */
    int64_t not_before_s, not_after_s; /* UTC since 1970 */
    uint8_t aggregator_key[SIGN_PUBLIC_SIZE];
    uint8_t aggregator_certificate_hash[HASH_SIZE];
    uint32_t colluders_min;    /* least c a plan may assume; 0: the default for its n is the minimum */
    uint32_t honest_min;       /* least m; 0: the default for its n */
    struct roster_site *sites; /* (sites_len), sorted by id, owned */
    uint32_t sites_len;
    uint8_t (*authors)[SIGN_PUBLIC_SIZE]; /* (authors_len), keys that may sign plans, owned */
    uint32_t authors_len;
    uint8_t (*revoked)[HASH_SIZE]; /* (revoked_len), certificate hashes, owned */
    uint32_t revoked_len;

    uint8_t hash[HASH_SIZE]; /* of the body, set by roster_sign and roster_open */
};

void roster_init(struct roster *r);
void roster_release(struct roster *r); /* accepts NULL and zeroed */

/* For the governance command. Sites may come in any order. ERR_EXISTS for a repeated id, key or certificate. */
int MUST_USE roster_add_site(struct roster *r, const struct roster_site *site, struct error *err);
int MUST_USE roster_add_author(struct roster *r, const uint8_t key[SIGN_PUBLIC_SIZE], struct error *err);
int MUST_USE roster_revoke(struct roster *r, const uint8_t certificate_hash[HASH_SIZE], struct error *err);
/* Checks, encodes, signs; appends the signed bytes to out and sets r->hash. */
int MUST_USE roster_sign(struct roster *r, const struct sign_key *governance, struct buffer *out, struct error *err);

/* Parses untrusted bytes and verifies the signature. ERR_INTEGRITY. Copies everything: bytes may go away. */
int MUST_USE roster_open(struct roster *ret_r, struct span signed_bytes,
                         const uint8_t governance_public[SIGN_PUBLIC_SIZE], struct error *err);
/* ERR_POLICY outside not_before_s .. not_after_s. */
int MUST_USE roster_check_time(const struct roster *r, int64_t now_s, struct error *err);
/* May `next` replace `current`? 0 for the same roster or its direct successor in the same federation; ERR_INTEGRITY for
 * a lower serial, a fork (same serial, other hash) or a gap (previous hash differs: fetch the rosters in between). */
int MUST_USE roster_may_follow(const struct roster *current, const struct roster *next, struct error *err);

const struct roster_site *roster_find(const struct roster *r, const char *id); /* NULL: not listed */
bool roster_is_revoked(const struct roster *r, const uint8_t certificate_hash[HASH_SIZE]);
bool roster_is_author(const struct roster *r, const uint8_t key[SIGN_PUBLIC_SIZE]);
/* Listed as a trainer, not revoked, certificate not expired. ERR_POLICY names the site and the reason. */
int MUST_USE roster_admit(const struct roster *r, const char *id, int64_t now_s, const struct roster_site **ret_site,
                          struct error *err);
bool site_id_valid(const char *id);

#endif
