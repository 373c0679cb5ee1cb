#include "protocol/attempt.h"

#include <stdio.h>
#include <stdlib.h>

void attempt_release(struct attempt *a)
{
    for (uint32_t i = 0; a->members && i < a->info.quorum.n; i++)
        buffer_release(&a->members[i].advert);
    free(a->members);
    a->members = NULL;
}

struct member *attempt_find(struct attempt *a, const char *id)
{
    uint32_t low = 0, high = a->info.quorum.n;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        int order = strcmp(id, a->members[middle].id);
        if (order == 0)
            return &a->members[middle];
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

static bool in_set(const struct member *m, int set)
{
    return set == 0 || (set == 1 && m->u1) || (set == 2 && m->u2) || (set == 3 && m->u3);
}

static uint32_t count(const struct attempt *a, int set)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < a->info.quorum.n; i++)
        n += in_set(&a->members[i], set);
    return n;
}

uint32_t attempt_count_u1(const struct attempt *a)
{
    return count(a, 1);
}

uint32_t attempt_count_u2(const struct attempt *a)
{
    return count(a, 2);
}

uint32_t attempt_count_u3(const struct attempt *a)
{
    return count(a, 3);
}

struct member *attempt_read_member(struct attempt *a, struct reader *in, const char **previous, int set)
{
    char id[SITE_ID_SIZE];

    reader_string(in, id, sizeof id);
    struct member *m = in->failed ? NULL : attempt_find(a, id);
    if (!m || !in_set(m, set) || strcmp(*previous, m->id) >= 0)
        return NULL;
    *previous = m->id;
    return m;
}

void attempt_h1(struct attempt *a)
{
    struct hash h;

    hash_begin(&h, "consilium/h1");
    hash_part(&h, span_of(a->info.h0, HASH_SIZE));
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        if (a->members[i].u1)
            hash_part(&h, buffer_span(&a->members[i].advert));
    }
    hash_end(&h, a->h1);
}

static void hash_roots(const struct attempt *a, const char *label, const uint8_t previous[HASH_SIZE], int set,
                       uint8_t out[HASH_SIZE])
{
    struct hash h;

    hash_begin(&h, label);
    hash_part(&h, span_of(previous, HASH_SIZE));
    for (uint32_t i = 0; i < a->info.quorum.n; i++) {
        const struct member *m = &a->members[i];
        if (!in_set(m, set))
            continue;
        hash_part(&h, span_str(m->id));
        hash_part(&h, span_of(set == 2 ? m->share_root : m->vector_root, HASH_SIZE));
    }
    hash_end(&h, out);
}

void attempt_h2(struct attempt *a)
{
    hash_roots(a, "consilium/h2", a->h1, 2, a->h2);
}

void attempt_h3(struct attempt *a)
{
    hash_roots(a, "consilium/h3", a->h2, 3, a->h3);
}

void stage_sign(int stage, const char *site, const uint8_t previous[HASH_SIZE], struct span content,
                const struct sign_key *key, uint8_t out[SIGN_SIZE])
{
    char label[32];
    const struct span parts[] = {span_str(site), span_of(previous, HASH_SIZE), content};

    snprintf(label, sizeof label, "consilium/m%d", stage);
    sign_parts(key, label, parts, ARRAY_LEN(parts), out);
}

int stage_verify(int stage, const struct member *m, const uint8_t previous[HASH_SIZE], struct span content,
                 const uint8_t signature[SIGN_SIZE], struct error *err)
{
    char label[32];
    const struct span parts[] = {span_str(m->id), span_of(previous, HASH_SIZE), content};

    snprintf(label, sizeof label, "consilium/m%d", stage);
    if (sign_verify(m->site->public_key, label, parts, ARRAY_LEN(parts), signature) < 0)
        return error_set(err, ERR_INTEGRITY, "M%d: the signature of site %s does not match", stage, m->id);
    return 0;
}

int message_open(int stage, const uint8_t previous[HASH_SIZE], struct span message, struct reader *ret_in,
                 const uint8_t **ret_signature, struct error *err)
{
    if (message.len < 1 + HASH_SIZE + SIGN_SIZE || message.len > MESSAGE_MAX || message.ptr[0] != stage)
        return error_set(err, ERR_INTEGRITY, "M%d expected, got something else (%zu bytes)", stage, message.len);
    if (memcmp(message.ptr + 1, previous, HASH_SIZE) != 0)
        return error_set(err, ERR_INTEGRITY,
                         "M%d belongs to another attempt or transcript: replay or equivocation, refused", stage);
    *ret_in = reader_of(span_of(message.ptr + 1 + HASH_SIZE, message.len - 1 - HASH_SIZE - SIGN_SIZE));
    *ret_signature = message.ptr + message.len - SIGN_SIZE;
    return 0;
}

void message_begin(struct buffer *b, int stage, const uint8_t previous[HASH_SIZE])
{
    buffer_release(b);
    buffer_init(b, MESSAGE_MAX);
    buffer_u8(b, (uint8_t)stage);
    buffer_append(b, previous, HASH_SIZE);
}

void broadcast_end(struct buffer *b, const struct sign_key *aggregator)
{
    uint8_t signature[SIGN_SIZE];
    struct span body = buffer_span(b);

    sign_parts(aggregator, "consilium/broadcast", &body, 1, signature);
    buffer_append(b, signature, SIGN_SIZE);
}

int broadcast_open(const struct attempt *a, int stage, const uint8_t previous[HASH_SIZE], struct span message,
                   struct reader *ret_in, struct error *err)
{
    const uint8_t *signature = NULL;
    int rc = message_open(stage, previous, message, ret_in, &signature, err);

    if (rc < 0)
        return rc;
    struct span body = span_of(message.ptr, message.len - SIGN_SIZE);
    if (sign_verify(a->roster->aggregator_key, "consilium/broadcast", &body, 1, signature) < 0)
        return error_set(err, ERR_INTEGRITY, "M%d is not signed by the aggregator of the roster", stage);
    return 0;
}
