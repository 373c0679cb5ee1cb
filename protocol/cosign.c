#include "protocol/cosign.h"

#include "base/reader.h"

#define COSIGN_LABEL "consilium/cosign/v1"

void cosign_statement_encode(const struct cosign_statement *s, struct buffer *b)
{
    buffer_string(b, s->federation);
    buffer_string(b, s->job);
    buffer_u32(b, s->round);
    buffer_u32(b, s->attempt);
    buffer_u32(b, s->n);
    buffer_u32(b, s->c);
    buffer_append(b, s->previous_hash, HASH_SIZE);
    buffer_append(b, s->sum_hash, HASH_SIZE);
    buffer_append(b, s->h3, HASH_SIZE);
    buffer_append(b, s->next_hash, HASH_SIZE);
}

void cosign_statement_decode(struct reader *r, struct cosign_statement *s)
{
    reader_string(r, s->federation, sizeof s->federation);
    reader_string(r, s->job, sizeof s->job);
    s->round = reader_u32(r);
    s->attempt = reader_u32(r);
    s->n = reader_u32(r);
    s->c = reader_u32(r);
    reader_copy(r, s->previous_hash, HASH_SIZE);
    reader_copy(r, s->sum_hash, HASH_SIZE);
    reader_copy(r, s->h3, HASH_SIZE);
    reader_copy(r, s->next_hash, HASH_SIZE);
}

static void statement_hash(const struct cosign_statement *s, const char *site, uint8_t out[HASH_SIZE])
{
    struct hash h;

    hash_begin(&h, COSIGN_LABEL);
    hash_part(&h, span_str(site));
    hash_part(&h, span_str(s->federation));
    hash_part(&h, span_str(s->job));
    hash_part_u64(&h, s->round);
    hash_part_u64(&h, s->attempt);
    hash_part_u64(&h, s->n);
    hash_part_u64(&h, s->c);
    hash_part(&h, span_of(s->previous_hash, HASH_SIZE));
    hash_part(&h, span_of(s->sum_hash, HASH_SIZE));
    hash_part(&h, span_of(s->h3, HASH_SIZE));
    hash_part(&h, span_of(s->next_hash, HASH_SIZE));
    hash_end(&h, out);
}

void cosign_sign(const struct cosign_statement *s, const char *site, const struct sign_key *key,
                 uint8_t ret_signature[SIGN_SIZE])
{
    uint8_t hash[HASH_SIZE];

    statement_hash(s, site, hash);
    sign_hash(key, hash, ret_signature);
}

static int check_entry(const struct cosign_statement *s, const struct roster *roster, int64_t now_s, const char *site,
                       const uint8_t signature[SIGN_SIZE], struct error *err)
{
    const struct roster_site *listed = NULL;
    uint8_t hash[HASH_SIZE];
    int rc = roster_admit(roster, site, now_s, &listed, err);

    if (rc < 0)
        return rc;
    statement_hash(s, site, hash);
    if (sign_verify_hash(listed->public_key, hash, signature) < 0)
        return error_set(err, ERR_INTEGRITY, "the co-signature of site %s does not match the result", site);
    return 0;
}

int cosign_collect(struct cosign_collector *c, const char *site, const uint8_t signature[SIGN_SIZE], struct error *err)
{
    uint32_t at = 0;
    int rc = check_entry(&c->statement, c->roster, c->now_s, site, signature, err);

    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < c->count; i++) {
        int order = strcmp(c->entries[i].site, site);
        if (order == 0)
            return 0;
        if (order < 0)
            at = i + 1;
    }
    if (c->count >= SECAGG_SITES_MAX)
        return error_set(err, ERR_RESOURCES, "more than %d co-signatures", SECAGG_SITES_MAX);
    memmove(c->entries + at + 1, c->entries + at, (c->count - at) * sizeof c->entries[0]);
    memcpy(c->entries[at].site, site, strlen(site) + 1);
    memcpy(c->entries[at].signature, signature, SIGN_SIZE);
    c->count++;
    return 0;
}

bool cosign_enough(const struct cosign_collector *c)
{
    return c->count >= quorum_threshold(c->statement.n, c->statement.c);
}

int cosign_proof(const struct cosign_collector *c, struct buffer *out, struct error *err)
{
    if (!cosign_enough(c))
        return error_set(err, ERR_AGAIN, "%u of %u co-signatures", c->count,
                         quorum_threshold(c->statement.n, c->statement.c));
    cosign_statement_encode(&c->statement, out);
    buffer_u32(out, c->count);
    for (uint32_t i = 0; i < c->count; i++) {
        buffer_string(out, c->entries[i].site);
        buffer_append(out, c->entries[i].signature, SIGN_SIZE);
    }
    return buffer_ok(out) ? 0 : error_set(err, ERR_RESOURCES, "no room for the co-signatures");
}

static int check_counts(const struct cosign_statement *s, const struct roster *roster, uint32_t colluders_min,
                        struct error *err)
{
    uint32_t least = colluders_min > roster->colluders_min ? colluders_min : roster->colluders_min;

    /* The signers must outnumber the colluders, and t > c whenever n > c. */
    if (s->n < SECAGG_SITES_MIN || s->n > SECAGG_SITES_MAX || s->c < 1 || s->c >= s->n)
        return error_set(err, ERR_INTEGRITY, "co-signed result with impossible counts");
    if (least == 0)
        least = quorum_colluders_default(s->n);
    if (s->c < least)
        return error_set(err, ERR_POLICY, "the co-signed result assumes %u colluders, at least %u are asked for", s->c,
                         least);
    return 0;
}

int cosign_verify(struct span proof, const struct roster *roster, int64_t now_s, uint32_t colluders_min,
                  struct cosign_statement *ret_statement, struct error *err)
{
    struct reader in = reader_of(proof);
    struct cosign_statement s = {0};
    char site[SITE_ID_SIZE], previous[SITE_ID_SIZE] = "";
    uint8_t signature[SIGN_SIZE];
    int rc;

    cosign_statement_decode(&in, &s);
    uint32_t count = reader_count(&in, SECAGG_SITES_MAX, 4 + 1 + SIGN_SIZE);
    if (in.failed || strcmp(s.federation, roster->federation) != 0)
        return error_set(err, ERR_INTEGRITY, "malformed co-signatures, or of another federation");
    if ((rc = check_counts(&s, roster, colluders_min, err)) < 0)
        return rc;
    if (count < quorum_threshold(s.n, s.c))
        return error_set(err, ERR_INTEGRITY, "%u co-signatures, %u are needed", count, quorum_threshold(s.n, s.c));
    for (uint32_t i = 0; i < count; i++) {
        reader_string(&in, site, sizeof site);
        reader_copy(&in, signature, sizeof signature);
        if (in.failed || strcmp(previous, site) >= 0)
            return error_set(err, ERR_INTEGRITY, "co-signatures are malformed, unsorted or repeated");
        if ((rc = check_entry(&s, roster, now_s, site, signature, err)) < 0)
            return rc;
        memcpy(previous, site, sizeof previous);
    }
    if (!reader_done(&in))
        return error_set(err, ERR_INTEGRITY, "bytes after the co-signatures");
    *ret_statement = s;
    return 0;
}
