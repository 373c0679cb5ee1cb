/*
 * A site's keys and what it was told to trust: its identity, the CA and the governance key pinned at enrolment, and the
 * newest roster that the governance key signed.
 *
 *     state/site.key        Ed25519, PKCS #8, 0600         made by `init`
 *     state/site.csr        the request for the CA         made by `init`
 *     state/site.crt ca.crt governance.pub roster.bin     written by `enroll`, all or none
 *
 * The CA's and the governance key's fingerprints reach the site out of band: enrolment compares them before anything is
 * stored. Read-only but for vault_take_roster; one thread.
 */
#ifndef NODE_VAULT_VAULT_H
#define NODE_VAULT_VAULT_H

#include "base/clock.h"
#include "crypto/certificate.h"
#include "crypto/identity.h"
#include "protocol/roster.h"
#include "runtime/config.h"

struct vault {
    const struct config *config;
    struct identity_key *key;
    struct certificate *own, *ca;
    uint8_t governance[SIGN_PUBLIC_SIZE];
    struct roster roster;
};

/* Makes the state folder, the key and the request. ERR_EXISTS if the site has a key already. */
int MUST_USE vault_create(const struct config *config, const struct rng *rng, uint8_t ret_fingerprint[HASH_SIZE],
                          struct error *err);

struct enrolment { /* paths and hex fingerprints as given on the command line */
    const char *certificate, *ca, *roster, *governance;
    const char *ca_fingerprint, *governance_fingerprint;
};
/* ERR_INTEGRITY (exit 6) and nothing stored when a fingerprint, a signature, or the site's own entry does not fit. */
int MUST_USE vault_enroll(const struct config *config, const struct enrolment *enrolment, const struct clock *clock,
                          struct error *err);

/* ERR_CONFIG tells which step is missing (`init`, `enroll`). */
int MUST_USE vault_open(struct vault *ret_vault, const struct config *config, const struct clock *clock,
                        struct error *err);
void vault_release(struct vault *vault); /* accepts NULL and zeroed */

/* A roster offered by the aggregator: verified, no older and no fork, then stored and used. Sets *ret_changed.
 * before_change (may be NULL) is called while the old roster still lives: its entries are gone afterwards, so whatever
 * holds on to them, as an attempt of secure aggregation does, has to be let go in it. */
int MUST_USE vault_take_roster(struct vault *vault, struct span signed_roster, void (*before_change)(void *ctx),
                               void *ctx, bool *ret_changed, struct error *err);

#endif
