#include "protocol/roster.h"

#include "base/reader.h"

#include <stdlib.h>

#define ROSTER_LABEL "consilium/roster/v1"
#define SITE_BYTES_MIN (4 + 1 + HASH_SIZE + SIGN_PUBLIC_SIZE + 8 + 1)

bool site_id_valid(const char *id)
{
    size_t n = strnlen(id, SITE_ID_SIZE);

    if (n < 1 || n >= SITE_ID_SIZE)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (!((id[i] >= 'a' && id[i] <= 'z') || (id[i] >= '0' && id[i] <= '9') || id[i] == '-'))
            return false;
    }
    return true;
}

void roster_init(struct roster *r)
{
    memset(r, 0, sizeof *r);
}

void roster_release(struct roster *r)
{
    if (!r)
        return;
    free(r->sites);
    free(r->authors);
    free(r->revoked);
    memset(r, 0, sizeof *r);
}

static int no_memory(struct error *err)
{
    return error_set(err, ERR_RESOURCES, "no memory for the roster");
}

int roster_add_site(struct roster *r, const struct roster_site *site, struct error *err)
{
    uint32_t at = 0;

    if (!site_id_valid(site->id))
        return error_set(err, ERR_INTEGRITY, "roster: a site id must be 1 to 63 of [a-z0-9-]");
    if (site->role != SITE_TRAINER && site->role != SITE_EVALUATOR)
        return error_set(err, ERR_INTEGRITY, "roster: %s has an unknown role %d", site->id, (int)site->role);
    if (r->sites_len >= ROSTER_SITES_MAX)
        return error_set(err, ERR_RESOURCES, "roster: more than %d sites", ROSTER_SITES_MAX);
    for (uint32_t i = 0; i < r->sites_len; i++) {
        const struct roster_site *s = &r->sites[i];
        if (strcmp(s->id, site->id) == 0 || memcmp(s->public_key, site->public_key, SIGN_PUBLIC_SIZE) == 0 ||
            memcmp(s->certificate_hash, site->certificate_hash, HASH_SIZE) == 0)
            return error_set(err, ERR_EXISTS, "roster: %s repeats the id, key or certificate of %s", site->id, s->id);
        if (strcmp(s->id, site->id) < 0)
            at = i + 1;
    }
    struct roster_site *grown = realloc(r->sites, (r->sites_len + 1) * sizeof *grown);
    if (!grown)
        return no_memory(err);
    r->sites = grown;
    memmove(grown + at + 1, grown + at, (r->sites_len - at) * sizeof *grown);
    grown[at] = *site;
    r->sites_len++;
    return 0;
}

static int add_hash(uint8_t (**list)[32], uint32_t *len, uint32_t max, const uint8_t value[32], struct error *err)
{
    if (*len >= max)
        return error_set(err, ERR_RESOURCES, "roster: a list is longer than %u", max);
    for (uint32_t i = 0; i < *len; i++) {
        if (memcmp((*list)[i], value, 32) == 0)
            return error_set(err, ERR_EXISTS, "roster: a key or a revocation is listed twice");
    }
    uint8_t(*grown)[32] = realloc(*list, (*len + 1) * sizeof *grown);
    if (!grown)
        return no_memory(err);
    *list = grown;
    memcpy(grown[*len], value, 32);
    (*len)++;
    return 0;
}

int roster_add_author(struct roster *r, const uint8_t key[SIGN_PUBLIC_SIZE], struct error *err)
{
    return add_hash(&r->authors, &r->authors_len, ROSTER_AUTHORS_MAX, key, err);
}

int roster_revoke(struct roster *r, const uint8_t certificate_hash[HASH_SIZE], struct error *err)
{
    return add_hash(&r->revoked, &r->revoked_len, ROSTER_SITES_MAX, certificate_hash, err);
}

static int roster_check(const struct roster *r, struct error *err)
{
    static const uint8_t zeros[HASH_SIZE];

    if (!site_id_valid(r->federation))
        return error_set(err, ERR_INTEGRITY, "roster: the federation id must be 1 to 63 of [a-z0-9-]");
    if (r->serial < 1 || (r->serial == 1) != (memcmp(r->previous_hash, zeros, HASH_SIZE) == 0))
        return error_set(err, ERR_INTEGRITY, "roster: serial 1 has no previous roster, every other serial has one");
    if (r->not_after_s <= r->not_before_s)
        return error_set(err, ERR_INTEGRITY, "roster: not-after does not lie after not-before");
    if (r->honest_min == 1)
        return error_set(err, ERR_INTEGRITY, "roster: the least number of honest sites is 2 or more");
    return 0;
}

static void encode(const struct roster *r, struct buffer *b)
{
    buffer_string(b, r->federation);
    buffer_u64(b, r->serial);
    buffer_append(b, r->previous_hash, HASH_SIZE);
    buffer_u64(b, (uint64_t)r->not_before_s);
    buffer_u64(b, (uint64_t)r->not_after_s);
    buffer_append(b, r->aggregator_key, SIGN_PUBLIC_SIZE);
    buffer_append(b, r->aggregator_certificate_hash, HASH_SIZE);
    buffer_u32(b, r->colluders_min);
    buffer_u32(b, r->honest_min);
    buffer_u32(b, r->sites_len);
    for (uint32_t i = 0; i < r->sites_len; i++) {
        const struct roster_site *s = &r->sites[i];
        buffer_string(b, s->id);
        buffer_append(b, s->certificate_hash, HASH_SIZE);
        buffer_append(b, s->public_key, SIGN_PUBLIC_SIZE);
        buffer_u64(b, (uint64_t)s->certificate_not_after_s);
        buffer_u8(b, (uint8_t)s->role);
    }
    buffer_u32(b, r->authors_len);
    if (r->authors_len)
        buffer_append(b, r->authors, (size_t)r->authors_len * SIGN_PUBLIC_SIZE);
    buffer_u32(b, r->revoked_len);
    if (r->revoked_len)
        buffer_append(b, r->revoked, (size_t)r->revoked_len * HASH_SIZE);
}

int roster_sign(struct roster *r, const struct sign_key *governance, struct buffer *out, struct error *err)
{
    struct buffer body;
    uint8_t signature[SIGN_SIZE];
    int rc = roster_check(r, err);

    if (rc < 0)
        return rc;
    buffer_init(&body, ROSTER_BYTES_MAX);
    encode(r, &body);
    struct span part = buffer_span(&body);
    if (buffer_ok(&body)) {
        hash_labelled(ROSTER_LABEL, &part, 1, r->hash);
        sign_parts(governance, ROSTER_LABEL, &part, 1, signature);
        buffer_append(out, body.data, body.len);
        buffer_append(out, signature, SIGN_SIZE);
    }
    rc = buffer_ok(&body) && buffer_ok(out) ? 0 : no_memory(err);
    buffer_release(&body);
    return rc;
}

static int decode_sites(struct roster *r, struct reader *in, struct error *err)
{
    char previous[SITE_ID_SIZE] = "";
    uint32_t count = reader_count(in, ROSTER_SITES_MAX, SITE_BYTES_MIN);

    for (uint32_t i = 0; i < count; i++) {
        struct roster_site s = {0};
        reader_string(in, s.id, sizeof s.id);
        reader_copy(in, s.certificate_hash, HASH_SIZE);
        reader_copy(in, s.public_key, SIGN_PUBLIC_SIZE);
        s.certificate_not_after_s = (int64_t)reader_u64(in);
        s.role = (enum site_role)reader_u8(in);
        if (in->failed || strcmp(previous, s.id) >= 0)
            return error_set(err, ERR_INTEGRITY, "roster: malformed or unsorted list of sites");
        memcpy(previous, s.id, sizeof previous);
        int rc = roster_add_site(r, &s, err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int decode(struct roster *r, struct span body, struct error *err)
{
    struct reader in = reader_of(body);
    uint8_t value[32];
    int rc;

    reader_string(&in, r->federation, sizeof r->federation);
    r->serial = reader_u64(&in);
    reader_copy(&in, r->previous_hash, HASH_SIZE);
    r->not_before_s = (int64_t)reader_u64(&in);
    r->not_after_s = (int64_t)reader_u64(&in);
    reader_copy(&in, r->aggregator_key, SIGN_PUBLIC_SIZE);
    reader_copy(&in, r->aggregator_certificate_hash, HASH_SIZE);
    r->colluders_min = reader_u32(&in);
    r->honest_min = reader_u32(&in);
    if ((rc = decode_sites(r, &in, err)) < 0)
        return rc;
    for (uint32_t i = 0, count = reader_count(&in, ROSTER_AUTHORS_MAX, 32); i < count; i++) {
        reader_copy(&in, value, sizeof value);
        if ((rc = roster_add_author(r, value, err)) < 0)
            return rc;
    }
    for (uint32_t i = 0, count = reader_count(&in, ROSTER_SITES_MAX, 32); i < count; i++) {
        reader_copy(&in, value, sizeof value);
        if ((rc = roster_revoke(r, value, err)) < 0)
            return rc;
    }
    if (!reader_done(&in))
        return error_set(err, ERR_INTEGRITY, "roster: truncated, or with bytes after its end");
    return roster_check(r, err);
}

int roster_open(struct roster *ret_r, struct span signed_bytes, const uint8_t governance_public[SIGN_PUBLIC_SIZE],
                struct error *err)
{
    struct roster r = {0};
    int rc;

    if (signed_bytes.len <= SIGN_SIZE || signed_bytes.len > ROSTER_BYTES_MAX + SIGN_SIZE)
        return error_set(err, ERR_INTEGRITY, "roster: %zu bytes are no signed roster", signed_bytes.len);
    struct span body = span_of(signed_bytes.ptr, signed_bytes.len - SIGN_SIZE);
    if (sign_verify(governance_public, ROSTER_LABEL, &body, 1, body.ptr + body.len) < 0)
        return error_set(err, ERR_INTEGRITY,
                         "roster: not signed by the pinned governance key; compare its fingerprint out of band");
    rc = decode(&r, body, err);
    if (rc < 0) {
        roster_release(&r);
        return rc == ERR_RESOURCES ? rc : ERR_INTEGRITY;
    }
    hash_labelled(ROSTER_LABEL, &body, 1, r.hash);
    *ret_r = r;
    return 0;
}

int roster_check_time(const struct roster *r, int64_t now_s, struct error *err)
{
    if (now_s < r->not_before_s || now_s > r->not_after_s)
        return error_set(err, ERR_POLICY,
                         "roster serial %llu is %s: fetch a newer one, or set this machine's clock right",
                         (unsigned long long)r->serial, now_s < r->not_before_s ? "not valid yet" : "expired");
    return 0;
}

int roster_may_follow(const struct roster *current, const struct roster *next, struct error *err)
{
    unsigned long long from = current->serial, to = next->serial;

    if (strcmp(current->federation, next->federation) != 0)
        return error_set(err, ERR_INTEGRITY, "the roster is of federation %s, this site belongs to %s",
                         next->federation, current->federation);
    if (to < from)
        return error_set(err, ERR_INTEGRITY, "roster serial %llu is older than the held %llu: refused", to, from);
    if (to == from)
        return memcmp(current->hash, next->hash, HASH_SIZE) == 0
                   ? 0
                   : error_set(err, ERR_INTEGRITY, "two different rosters have serial %llu: a fork, refused", to);
    if (to != from + 1 || memcmp(next->previous_hash, current->hash, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY,
                         "roster serial %llu does not follow the held %llu: a fork, or rosters in between are missing",
                         to, from);
    return 0;
}

const struct roster_site *roster_find(const struct roster *r, const char *id)
{
    uint32_t low = 0, high = r->sites_len;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        int order = strcmp(id, r->sites[middle].id);
        if (order == 0)
            return &r->sites[middle];
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

static bool listed(const uint8_t (*list)[32], uint32_t len, const uint8_t value[32])
{
    for (uint32_t i = 0; i < len; i++) {
        if (memcmp(list[i], value, 32) == 0)
            return true;
    }
    return false;
}

bool roster_is_revoked(const struct roster *r, const uint8_t certificate_hash[HASH_SIZE])
{
    return listed((const uint8_t(*)[32])r->revoked, r->revoked_len, certificate_hash);
}

bool roster_is_author(const struct roster *r, const uint8_t key[SIGN_PUBLIC_SIZE])
{
    return listed((const uint8_t(*)[32])r->authors, r->authors_len, key);
}

int roster_admit(const struct roster *r, const char *id, int64_t now_s, const struct roster_site **ret_site,
                 struct error *err)
{
    const struct roster_site *site = roster_find(r, id);

    if (!site)
        return error_set(err, ERR_POLICY, "site %s is not in roster serial %llu", id, (unsigned long long)r->serial);
    if (site->role != SITE_TRAINER)
        return error_set(err, ERR_POLICY, "site %s is not a trainer in the roster", id);
    if (roster_is_revoked(r, site->certificate_hash))
        return error_set(err, ERR_POLICY, "the certificate of site %s is revoked", id);
    if (now_s > site->certificate_not_after_s)
        return error_set(err, ERR_POLICY, "the certificate of site %s has expired: renew it and sign a new roster", id);
    *ret_site = site;
    return 0;
}
