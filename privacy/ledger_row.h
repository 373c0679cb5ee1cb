/* One row of privacy/ledger as bytes: canonical body and chain hash. Private to the ledger. */
#ifndef PRIVACY_LEDGER_ROW_H
#define PRIVACY_LEDGER_ROW_H

#include "privacy/accountant.h"
#include "privacy/ledger.h"

#define LEDGER_BODY_MAX 8192

struct ledger_record {
    struct ledger_row row;
    char site[LEDGER_NAME_SIZE];                                                      /* GENESIS */
    double delta, order;                                                              /* GENESIS */
    uint8_t job_hash[DP_HASH_SIZE], dataset[DP_HASH_SIZE], binary_hash[DP_HASH_SIZE]; /* RESERVED */
    double curve[RDP_ORDERS];                                                         /* RESERVED: RDP of these steps */
};

void ledger_record_encode(const struct ledger_record *r, struct buffer *out);
/* ERR_INTEGRITY (no message) for anything that encode would not have written. The row's hash is left zero. */
int MUST_USE ledger_record_decode(struct span body, struct ledger_record *ret_record);
/* hash_labelled("consilium/ledger", previous hash, body) */
void ledger_record_hash(const uint8_t previous[DP_HASH_SIZE], struct span body, uint8_t out[DP_HASH_SIZE]);

#endif
