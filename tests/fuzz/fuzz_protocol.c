/*
 * Fuzz targets of what arrives from other parties: signed records, the messages of secure aggregation, session
 * bodies, certificates. One source, one program for each FUZZ_ value (see CMakeLists.txt).
 *
 * Bytes nobody signed end at the signature check, so FUZZ_ROSTER, FUZZ_PLAN, FUZZ_COSIGN and FUZZ_STAGES sign what the
 * fuzzer made with the right key: the parser behind the check is what a malicious partner reaches.
 */
/* First: base/rng.h poisons rand, which these declare parameters as. */
#include <openssl/pem.h>
#include <openssl/x509.h>

#include "tests/sim/sim.h"

#include "crypto/authority.h"
#include "protocol/session.h"
#include "protocol/transport/transfer.h"

#include "tests/fuzz/fuzz.h"

#if defined(FUZZ_SESSION)
/* Bodies of the RPC: what decodes must encode to the same bytes. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct session_event event;
    struct session_message message;
    struct transfer_get get;
    struct transfer_begin begin;
    struct buffer again;
    struct error err = {0};
    struct span bytes = span_of(data, size);

    buffer_init(&again, size + 64);
    if (session_event_decode(bytes, &event, &err) == 0) {
        session_event_encode(&event, &again);
        if (!buffer_ok(&again) || again.len != size || memcmp(again.data, data, size) != 0)
            abort();
    }
    buffer_clear(&again);
    if (session_message_decode(bytes, &message, &err) == 0) {
        session_message_encode(&message, &again);
        if (!buffer_ok(&again) || again.len != size || memcmp(again.data, data, size) != 0)
            abort();
    }
    buffer_release(&again);
    (void)!transfer_get_decode(bytes, &get, &err);
    (void)!transfer_begin_decode(bytes, &begin, &err);
    return 0;
}
#else

/* A copy of `genuine`, changed as the fuzzer says: edits of four bytes, {position (2), operation, value}. */
static void edit(struct buffer *b, struct span genuine, const uint8_t *data, size_t size)
{
    buffer_init(b, MESSAGE_MAX);
    buffer_append(b, genuine.ptr, genuine.len);
    for (; size >= 4 && b->len > 0; data += 4, size -= 4) {
        size_t at = (size_t)(data[0] | data[1] << 8) % b->len;
        switch (data[2] % 6) {
        case 0:
            b->data[at] ^= data[3];
            break;
        case 1:
            b->data[at] = data[3];
            break;
        case 2: /* a run of the same */
            memset(b->data + at, data[3], b->len - at < 8 ? b->len - at : 8);
            break;
        case 3: /* cut */
            b->len = at;
            break;
        case 4: /* take out */
            memmove(b->data + at, b->data + at + 1, b->len - at - 1);
            b->len--;
            break;
        default: /* put in */
            buffer_u8(b, 0);
            memmove(b->data + at + 1, b->data + at, b->len - at - 1);
            b->data[at] = data[3];
        }
    }
}

#if defined(FUZZ_STAGES)
static const uint8_t *input;
static size_t input_size;
static unsigned target_stage, target_site;
static bool resign, changed;

/* The message of `stage` to or from site i, edited if it is the one aimed at. */
static struct span message_of(struct sim *s, struct buffer *b, unsigned stage, uint32_t i, struct span genuine)
{
    if (stage != target_stage || i != target_site)
        return genuine;
    if (!resign || stage % 2 == 1 || genuine.len <= SIGN_SIZE) {
        edit(b, genuine, input, input_size);
    } else {
        edit(b, span_of(genuine.ptr, genuine.len - SIGN_SIZE), input, input_size);
        sim_resign(s, b);
    }
    changed = b->len != genuine.len || memcmp(b->data, genuine.ptr, b->len) != 0;
    return buffer_span(b);
}

static void check_sum(const struct sim *s)
{
    const uint32_t *sum = secagg_server_sum(s->server);

    for (size_t j = 0; j < s->words; j++) {
        uint32_t expected = 0;
        for (uint32_t i = 0; i < s->n; i++)
            expected += secagg_server_is_survivor(s->server, s->sites[i].id) ? s->sites[i].plain[j] : 0;
        if (sum[j] != expected)
            abort();
    }
}

static int result(struct sim *s, struct buffer *b)
{
    struct cosign_statement statement;
    struct span m10;
    uint8_t next_hash[HASH_SIZE] = {1};
    float next[2][8];
    struct secagg_result_in in = {.sum = secagg_server_sum(s->server),
                                  .previous = {s->params, s->momentum, s->words},
                                  .next_params = next[0],
                                  .next_momentum = next[1]};
    struct secagg_result_out out;
    struct model_basis basis = job_plan_basis(&s->plan, s->frozen_hash);
    int rc = next_model_from_sum(&s->plan.aggregation.optimizer, in.previous, sim_segment(s), in.sum,
                                 secagg_server_survivors(s->server), s->plan.aggregation.grid_bits, next[0], next[1],
                                 &s->err);

    if (rc < 0)
        return rc;
    model_state_hash(&basis, (struct model_state){next[0], next[1], s->words}, next_hash);
    if ((rc = secagg_server_result(s->server, next_hash, &m10, &statement, &s->err)) < 0)
        return rc;
    return secagg_client_on_result(s->sites[target_site].client, message_of(s, b, 10, target_site, m10), &in, &out,
                                   &s->err);
}

/* A round of three sites in which one message, M0 to M10 of one site, is edited on its way. Nothing may crash, and a
 * round that ends must have the exact sum. */
static int round_with_edit(struct sim *s, struct buffer *b)
{
    int rc = sim_open_server(s);

    for (uint32_t i = 0; i < s->n && rc == 0; i++)
        rc = sim_join(s, i, message_of(s, b, 0, i, secagg_server_broadcast(s->server, s->sites[i].id)));
    while (rc == 0 && secagg_server_stage(s->server) != STAGE_RESULT) {
        unsigned stage = secagg_server_stage(s->server);
        for (uint32_t i = 0; i < s->n; i++) {
            const char *id = s->sites[i].id;
            struct span answer;
            struct span cast = secagg_server_broadcast(s->server, id);
            if (stage > STAGE_ADVERTISE)
                cast = message_of(s, b, stage - 1, i, cast);
            if (sim_answer(s, i, cast, &answer) < 0 ||
                secagg_server_receive(s->server, id, message_of(s, b, stage, i, answer), &s->err) < 0)
                continue;
            if (stage == STAGE_MASKED &&
                secagg_server_add_vector(s->server, id, span_of(s->sites[i].masked, s->words * 4), &s->err) < 0)
                continue;
        }
        rc = secagg_server_close_stage(s->server, &s->err);
    }
    if (rc == 0) {
        check_sum(s);
        rc = result(s, b);
    }
    return rc;
}

/* {stage, site and whether to sign again} and the edits. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct sim s;
    struct buffer b = {0};

    if (size < 2)
        return 0;
    target_stage = data[0] % 11;
    target_site = data[1] % 3;
    resign = data[1] & 0x80;
    changed = false;
    input = data + 2;
    input_size = size - 2;
    sim_init(&s, 3, 5, 1);
    int rc = round_with_edit(&s, &b);
    if (rc < 0 && !changed) {
        fprintf(stderr, "an honest round failed: %s\n", s.err.message);
        abort();
    }
    buffer_release(&b);
    sim_release(&s);
    return 0;
}
#elif defined(FUZZ_CERTIFICATE)
static struct buffer genuine[4]; /* by kind: nothing, and DER of a certificate, a revocation list, a request */

static void need(bool condition)
{
    if (!condition)
        abort();
}

static void make_genuine(void)
{
    const int64_t now_s = 1800000000;
    struct identity_key *ca_key = NULL, *key = NULL;
    struct certificate *ca = NULL, *site = NULL;
    struct certificate_crl *crl = NULL;
    struct buffer request, list;
    struct error err = {0};
    uint8_t *der = NULL;
    char *name = NULL, *head = NULL;
    long len = 0;
    int n;

    for (int i = 0; i < 4; i++)
        buffer_init(&genuine[i], 1 << 16);
    buffer_init(&request, 1 << 16);
    buffer_init(&list, 1 << 16);
    need(identity_key_from_seed((const uint8_t[SIGN_SEED_SIZE]){1}, &ca_key, &err) == 0 &&
         identity_key_from_seed((const uint8_t[SIGN_SEED_SIZE]){2}, &key, &err) == 0 &&
         authority_create(ca_key, "demo", now_s, 365, &random_system, &ca, &err) == 0 &&
         identity_request(key, IDENTITY_SITE, "clinic-a", &request, &err) == 0 &&
         authority_approve(ca_key, ca, buffer_span(&request), now_s, 30, &random_system, &site, &err) == 0);
    struct span serial = certificate_serial(site);
    need(authority_crl(ca_key, ca, &serial, 1, 1, now_s, 30, &list, &err) == 0 &&
         certificate_crl_parse(buffer_span(&list), &crl, &err) == 0);
    buffer_append(&genuine[1], certificate_der(site).ptr, certificate_der(site).len);
    n = i2d_X509_CRL(certificate_crl_x509(crl), &der);
    need(n > 0);
    buffer_append(&genuine[2], der, (size_t)n);
    OPENSSL_free(der);
    BIO *in = BIO_new_mem_buf(request.data, (int)request.len);
    need(PEM_read_bio(in, &name, &head, &der, &len) == 1);
    buffer_append(&genuine[3], der, (size_t)len);
    BIO_free(in);
    OPENSSL_free(name);
    OPENSSL_free(head);
    OPENSSL_free(der);
    buffer_release(&request);
    buffer_release(&list);
    certificate_crl_free(crl);
    certificate_free(site);
    certificate_free(ca);
    identity_key_free(key);
    identity_key_free(ca_key);
}

static void read_request(struct span der)
{
    struct identity_request_info info;
    BIO *out = BIO_new(BIO_s_mem());
    char *pem;

    need(out && PEM_write_bio(out, "CERTIFICATE REQUEST", "", der.ptr, (long)der.len) > 0);
    long len = BIO_get_mem_data(out, &pem);
    if (identity_request_read(span_of(pem, (size_t)len), &info, NULL) == 0)
        need(identity_id_valid(info.id));
    BIO_free(out);
}

/* The first byte says whether the rest is the file itself or edits of a genuine certificate, list or request. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct certificate *certificate = NULL;
    struct certificate_crl *crl = NULL;
    struct buffer b;
    struct error err = {0};

    if (size < 1)
        return 0;
    if (!genuine[1].data)
        make_genuine();
    if (data[0] % 4 == 0) {
        buffer_init(&b, size);
        buffer_append(&b, data + 1, size - 1);
    } else {
        edit(&b, buffer_span(&genuine[data[0] % 4]), data + 1, size - 1);
    }
    if (certificate_parse(buffer_span(&b), &certificate, &err) == 0) {
        need(identity_id_valid(certificate_id(certificate)));
        (void)!certificate_verify(certificate, certificate, NULL, certificate_kind(certificate), 1800000000, &err);
        certificate_free(certificate);
    }
    if (certificate_crl_parse(buffer_span(&b), &crl, &err) == 0)
        certificate_crl_free(crl);
    if (identity_request_read(buffer_span(&b), &(struct identity_request_info){0}, &err) < 0 && b.len > 0)
        read_request(buffer_span(&b));
    buffer_release(&b);
    return 0;
}
#elif defined(FUZZ_COSIGN)
/* A proof by three sites, edited; with the top bit of the first byte set the statement in it is edited and signed. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct sim s;
    struct cosign_collector collector = {0};
    struct cosign_statement out;
    struct buffer proof, b;

    if (size < 1)
        return 0;
    sim_init(&s, 3, 1, 1);
    collector.statement = (struct cosign_statement){.round = 1, .attempt = 1, .n = 3};
    snprintf(collector.statement.federation, sizeof collector.statement.federation, "demo");
    snprintf(collector.statement.job, sizeof collector.statement.job, "icd-demo");
    collector.statement.c = 1;
    if (data[0] & 0x80) {
        struct buffer statement;
        struct reader in;
        buffer_init(&b, MESSAGE_MAX);
        cosign_statement_encode(&collector.statement, &b);
        edit(&statement, buffer_span(&b), data + 1, size - 1);
        in = reader_of(buffer_span(&statement));
        cosign_statement_decode(&in, &out);
        if (!in.failed)
            collector.statement = out;
        buffer_release(&statement);
        buffer_release(&b);
        size = 1;
    }
    collector.roster = &s.roster;
    collector.now_s = s.now_s;
    buffer_init(&proof, COSIGN_PROOF_MAX);
    for (uint32_t i = 0; i < s.n; i++) {
        uint8_t signature[SIGN_SIZE];
        cosign_sign(&collector.statement, s.sites[i].id, &s.sites[i].key, signature);
        if (cosign_collect(&collector, s.sites[i].id, signature, &s.err) < 0)
            break;
    }
    if (cosign_proof(&collector, &proof, &s.err) == 0) {
        edit(&b, buffer_span(&proof), data + 1, size - 1);
        (void)!cosign_verify(buffer_span(&b), &s.roster, s.now_s, 0, &out, &s.err);
        buffer_release(&b);
    }
    buffer_release(&proof);
    sim_release(&s);
    return 0;
}
#else
/* A genuine roster or plan with its body edited and signed by the right key; what opens must sign to the same bytes. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct sim s;
    struct buffer b, again;
    uint8_t signature[SIGN_SIZE];

    sim_init(&s, 3, 1, 1);
    buffer_init(&again, MESSAGE_MAX);
#if defined(FUZZ_ROSTER)
    struct roster roster = {0};
    edit(&b, span_of(s.signed_roster.data, s.signed_roster.len - SIGN_SIZE), data, size);
    struct span body = buffer_span(&b);
    sign_parts(&s.governance, "consilium/roster/v1", &body, 1, signature);
    buffer_append(&b, signature, SIGN_SIZE);
    bool opened = roster_open(&roster, buffer_span(&b), s.governance.public_key, &s.err) == 0;
    if (opened && roster_sign(&roster, &s.governance, &again, &s.err) < 0)
        abort();
    if (opened)
        (void)!roster_may_follow(&s.roster, &roster, &s.err);
    roster_release(&roster);
#else
    struct job_plan plan = {0};
    edit(&b, span_of(s.signed_plan.data, s.signed_plan.len - SIGN_PUBLIC_SIZE - SIGN_SIZE), data, size);
    struct span body = buffer_span(&b);
    sign_parts(&s.author, "consilium/plan/v2", &body, 1, signature);
    buffer_append(&b, s.author.public_key, SIGN_PUBLIC_SIZE);
    buffer_append(&b, signature, SIGN_SIZE);
    bool opened = job_plan_open(&plan, buffer_span(&b), &s.roster, &s.err) == 0;
    if (opened && job_plan_sign(&plan, &s.author, &again, &s.err) < 0)
        abort();
#endif
    if (opened && (again.len != b.len || memcmp(again.data, b.data, b.len) != 0))
        abort();
    buffer_release(&again);
    buffer_release(&b);
    sim_release(&s);
    return 0;
}
#endif
#endif
