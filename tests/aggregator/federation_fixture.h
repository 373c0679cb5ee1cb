/* What the tests of identities share: an aggregator with a CA, a governance key, and sites, as files in a temporary
 * folder, made by the same functions as the commands use. */
#ifndef TESTS_AGGREGATOR_FEDERATION_FIXTURE_H
#define TESTS_AGGREGATOR_FEDERATION_FIXTURE_H

#include "aggregator/registry/registry.h"
#include "node/vault/vault.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

struct fixture_federation {
    char folder[64]; /* temporary */
    struct config *aggregator;
    struct identity_key *governance;
    uint8_t ca_fingerprint[HASH_SIZE];
};

void fixture_federation_open(struct fixture_federation *f, const char *name);
void fixture_federation_release(struct fixture_federation *f);

/* A path in the folder; at most 8 live at a time. */
const char *fixture_path(const struct fixture_federation *f, const char *name);
/* A configuration of the schema with these lines, and paths taken from the folder. */
struct config *fixture_config(const struct fixture_federation *f, const struct config_schema *schema, const char *text);
/* node.yaml of a site of the federation "test" whose state folder is the site's name. */
struct config *fixture_site(const struct fixture_federation *f, const char *site);
/* init at the site, approve at the aggregator; the certificate lies in FOLDER/site.crt. */
void fixture_certify(const struct fixture_federation *f, const struct config *site);
/* Drafts as the aggregator does, signs with key, writes FOLDER/name. */
void fixture_sign_roster(const struct fixture_federation *f, const struct identity_key *key, const char *name);
/* The same from given bytes of a roster. */
void fixture_write(const struct fixture_federation *f, const char *name, struct span bytes);

#endif
