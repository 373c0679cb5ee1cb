/*
 * Who belongs: the CA and server certificate made at `init`, the certificates that `ca approve` signed, the roster
 * draft that goes to the governance key, and the signed roster in force.
 *
 *     state/ca.key ca.crt server.key server.crt   made by `init`
 *     state/sites/<id>.crt  <id>.role             written by `ca approve`
 *     state/roster.bin                            installed by `roster install`, checked against governance.pub
 *
 * The governance key is never here: a draft is text that is carried to it and comes back signed.
 */
#ifndef AGGREGATOR_REGISTRY_REGISTRY_H
#define AGGREGATOR_REGISTRY_REGISTRY_H

#include "base/clock.h"
#include "crypto/certificate.h"
#include "crypto/identity.h"
#include "protocol/roster.h"
#include "runtime/config.h"

/* ret_fingerprint: of the CA certificate, to be told to the sites out of band. ERR_EXISTS if there is a CA already. */
int MUST_USE registry_create(const struct config *config, const struct clock *clock, const struct rng *rng,
                             uint8_t ret_fingerprint[HASH_SIZE], struct error *err);

/* Signs a request; the certificate is stored and its PEM appended to out. role: SITE_TRAINER or SITE_EVALUATOR. */
int MUST_USE registry_approve(const struct config *config, const char *request_path, enum site_role role,
                              const struct clock *clock, const struct rng *rng, struct buffer *out, struct error *err);

/* What a request says, for the confirmation before it is approved. */
int MUST_USE registry_read_request(const char *request_path, struct identity_request_info *ret_info, struct error *err);

/* Appends the JSON draft of the next roster: approved sites, plan authors (public key files), minima, validity. */
int MUST_USE registry_draft(const struct config *config, const char *const *author_files, size_t author_count,
                            const struct clock *clock, struct buffer *out, struct error *err);

/* Takes a signed roster into force; governance_file is pinned at the first time. */
int MUST_USE registry_install(const struct config *config, const char *roster_path, const char *governance_file,
                              struct error *err);

struct registry {
    struct identity_key *server_key;
    struct roster roster;
    struct buffer signed_roster;
};
/* For `run`. ERR_CONFIG tells which step is missing. */
int MUST_USE registry_open(struct registry *ret_registry, const struct config *config, struct error *err);
void registry_release(struct registry *r); /* accepts NULL and zeroed */

#endif
