/*
 * What this site's records cost: the privacy ledger of the state folder, the declared number of records, and the
 * commitment to the records that a reservation names. One place for the daemon, `train --local` and the reports, so
 * that all of them count alike.
 *
 *     uint8_t commitment[HASH_SIZE];
 *     rc = account_load(config, site, "none", 256, key, &data, commitment, &err);
 *     rc = account_declared(config, store, data, &records, &err);
 *     rc = account_open(&ledger, config, store, &plan, &clock_system, &err);
 */
#ifndef NODE_JOBS_ACCOUNT_H
#define NODE_JOBS_ACCOUNT_H

#include "base/clock.h"
#include "crypto/sign.h"
#include "node/jobs/site_store.h"
#include "node/site.h"
#include "privacy/ledger.h"

/* Makes the ledger at the first call of a site's life; ERR_INTEGRITY when it is gone later: an empty one would forget
 * what is spent. expected: as in ledger_options; NULL: by the budget alone. */
int MUST_USE account_open(struct ledger **ret_ledger, const struct config *config, struct site_store *store,
                          const struct dp_plan *expected, const struct clock *clock, struct error *err);
/* To look only. ERR_NOT_FOUND while nothing was ever reserved here. */
int MUST_USE account_read(struct ledger **ret_ledger, const struct config *config, struct site_store *store,
                          const struct clock *clock, struct error *err);

/* N of this site: data.declared_records, else what was fixed at the first use, else (and fixed from now on) as many as
 * data has. */
int MUST_USE account_declared(const struct config *config, struct site_store *store, const struct dataset *data,
                              uint64_t *ret_records, struct error *err);

/* The records of data.path, and the commitment to exactly these bytes: under the site's own key, so that nobody outside
 * can test guesses about the records against it. key NULL (a site that has none yet): zeros. ERR_POLICY without
 * data.path; ERR_AGAIN when the file changed while it was read. */
int MUST_USE account_load(const struct config *config, const struct site *site, const char *system_message,
                          int32_t tokens_max, const struct sign_key *key, struct dataset **ret_data,
                          uint8_t ret_commitment[HASH_SIZE], struct error *err);

/* SHA-256 of the running program; zeros when it cannot be read. */
void account_binary_hash(uint8_t ret_hash[HASH_SIZE]);

#endif
