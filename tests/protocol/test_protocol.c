/* Quorum tables, quantiser, server optimizer, roster and plan: values computed by hand or from the design's table. */
#include "crypto/random.h"
#include "protocol/job_plan.h"
#include "protocol/quantise.h"

#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

static struct error err;

static struct random_stream stream;
static struct rng rng;

static void quorum_table(void **state)
{
    (void)state;
    static const uint32_t table[][2] = {{3, 3}, {4, 3}, {5, 4}, {10, 7}, {32, 22}, {100, 67}, {200, 134}};
    struct quorum q;

    for (size_t i = 0; i < ARRAY_LEN(table); i++) {
        assert_int_equal(quorum_derive(&q, table[i][0], 0, 0, 0, &err), 0);
        assert_int_equal(q.t, table[i][1]);
        assert_true(2 * q.t > q.n + q.c);
        assert_true(q.floor >= q.t && q.floor >= q.m + q.c && q.floor <= q.n);
    }
    assert_int_equal(quorum_derive(&q, 2, 0, 0, 0, &err), ERR_CONFIG);
    assert_int_equal(quorum_derive(&q, 201, 0, 0, 0, &err), ERR_CONFIG);
    assert_int_equal(quorum_derive(&q, 5, 1, 1, 0, &err), ERR_CONFIG);
    assert_int_equal(quorum_derive(&q, 5, 5, 2, 0, &err), ERR_CONFIG);
    assert_int_equal(quorum_derive(&q, 5, 0, 0, 6, &err), ERR_CONFIG);
    assert_int_equal(quorum_derive(&q, 3, 2, 2, 0, &err), ERR_CONFIG); /* m + c = 4 > 3 */
    assert_int_equal(ring_clamp(5, 0), 429496729);
    assert_int_equal(ring_clamp(4, 1000.0), (2147483647 - 24000) / 4);
    assert_int_equal(ring_clamp(4, 1e9), 0);
}

static void quantiser(void **state)
{
    (void)state;
    float in[4] = {3.0f, -4.0f, 0.0f, 0x1p-140f}, out[4];
    uint32_t ring[4];
    struct quantise_info info;

    assert_int_equal(quantise_update(in, 4, 10.0, 4, 1000, &rng, ring, &info, &err), 0);
    assert_int_equal((int32_t)ring[0], 48);
    assert_int_equal((int32_t)ring[1], -64);
    assert_true(info.norm == 5.0 && info.scale == 1.0 && info.saturated == 0);
    assert_int_equal(quantise_update(in, 4, 2.5, 4, 1000, &rng, ring, &info, &err), 0); /* clipped to half */
    assert_int_equal((int32_t)ring[0], 24);
    assert_int_equal((int32_t)ring[1], -32);
    assert_int_equal(quantise_update(in, 4, 10.0, 4, 50, &rng, ring, &info, &err), 0);
    assert_int_equal((int32_t)ring[1], -50);
    assert_int_equal(info.saturated, 1);
    assert_int_equal(quantise_average(ring, 4, 2, 4, out, &err), 0);
    assert_true(out[1] == -50.0f / 32);
    in[2] = NAN;
    assert_int_equal(quantise_update(in, 4, 10.0, 4, 50, &rng, ring, NULL, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "index 2"));
    in[2] = -INFINITY;
    assert_int_equal(quantise_update(in, 4, 10.0, 4, 50, &rng, ring, NULL, &err), ERR_INTEGRITY);
}

/* 0.3 of a step: up with probability 0.3, so the mean of 40000 draws lies within 5 standard errors. */
static void rounding_is_unbiased(void **state)
{
    (void)state;
    enum { N = 40000 };
    float *in = malloc(N * sizeof *in);
    uint32_t *ring = malloc(N * sizeof *ring);
    double sum = 0;

    for (int i = 0; i < N; i++)
        in[i] = (float)((i % 2 ? -0.3 : 0.3) / 16);
    assert_int_equal(quantise_update(in, N, 1e6, 4, 1000, &rng, ring, NULL, &err), 0);
    for (int i = 0; i < N; i++) {
        int32_t v = (int32_t)ring[i];
        assert_true(i % 2 ? v == 0 || v == -1 : v == 0 || v == 1);
        sum += abs(v);
    }
    assert_true(fabs(sum / N - 0.3) < 5 * sqrt(0.21 / N));
    free(in);
    free(ring);
}

static void server_optimizers(void **state)
{
    (void)state;
    const float params[2] = {1.0f, -2.0f}, momentum[2] = {0.5f, 0.25f}, average[2] = {0.5f, 1.0f};
    float p[2], m[2];
    struct model_state before = {params, momentum, 2};
    struct server_optimizer avg = {SERVER_FEDAVG, 0.5f, 0.0f}, avgm = {SERVER_FEDAVGM, 0.5f, 0.5f};

    assert_int_equal(next_model_step(&avg, before, average, p, m, &err), 0);
    assert_true(p[0] == 1.25f && p[1] == -1.5f && m[0] == 0.5f && m[1] == 0.25f);
    assert_int_equal(next_model_step(&avgm, before, average, p, m, &err), 0);
    assert_true(m[0] == 0.75f && m[1] == 1.125f && p[0] == 1.375f && p[1] == -1.4375f);
    const float huge[2] = {3e38f, 0};
    avg.lr = 10.0f;
    assert_int_equal(next_model_step(&avg, before, huge, p, m, &err), ERR_INTEGRITY);

    /* One word of the two moves: 3 and -2 of two sites on a grid of 1/4. */
    const uint32_t sum[1] = {(uint32_t)1};
    avgm = (struct server_optimizer){SERVER_FEDAVGM, 0.5f, 0.5f};
    assert_int_equal(next_model_from_sum(&avgm, before, (struct model_segment){1, 1}, sum, 2, 2, p, m, &err), 0);
    assert_true(p[0] == 1.0f && m[0] == 0.5f && m[1] == 0.25f && p[1] == -1.875f);

    struct model_basis basis = {.lora_config = span_str("ffa")};
    uint8_t one[32], two[32];
    model_state_hash(&basis, before, one);
    basis.frozen_hash[3] = 1;
    model_state_hash(&basis, before, two);
    assert_memory_not_equal(one, two, 32);
    basis.frozen_hash[3] = 0;
    model_state_hash(&basis, (struct model_state){momentum, params, 2}, two);
    assert_memory_not_equal(one, two, 32);
}

static struct sign_key governance, author;

static void make_roster(struct roster *r, uint64_t serial, const uint8_t *previous, struct buffer *out)
{
    roster_init(r);
    snprintf(r->federation, sizeof r->federation, "demo");
    r->serial = serial;
    if (previous)
        memcpy(r->previous_hash, previous, HASH_SIZE);
    r->not_after_s = 1000;
    for (int i = 3; i > 0; i--) {
        struct roster_site site = {.role = SITE_TRAINER, .certificate_not_after_s = 500};
        snprintf(site.id, sizeof site.id, "site-%d", i);
        rng_fill(&rng, site.certificate_hash, HASH_SIZE);
        rng_fill(&rng, site.public_key, SIGN_PUBLIC_SIZE);
        assert_int_equal(roster_add_site(r, &site, &err), 0);
        assert_int_equal(roster_add_site(r, &site, &err), ERR_EXISTS);
    }
    assert_int_equal(roster_add_author(r, author.public_key, &err), 0);
    buffer_init(out, 1 << 20);
    assert_int_equal(roster_sign(r, &governance, out, &err), 0);
}

static void rosters(void **state)
{
    (void)state;
    struct roster first, second, fork, opened;
    struct buffer a, b, c;

    make_roster(&first, 1, NULL, &a);
    make_roster(&second, 2, first.hash, &b);
    make_roster(&fork, 2, second.hash, &c);
    assert_int_equal(roster_open(&opened, buffer_span(&a), governance.public_key, &err), 0);
    assert_memory_equal(opened.hash, first.hash, HASH_SIZE);
    assert_string_equal(opened.sites[0].id, "site-1");
    assert_non_null(roster_find(&opened, "site-3"));
    assert_null(roster_find(&opened, "site-4"));
    assert_int_equal(roster_check_time(&opened, 1001, &err), ERR_POLICY);
    assert_int_equal(roster_may_follow(&first, &second, &err), 0);
    assert_int_equal(roster_may_follow(&first, &first, &err), 0);
    assert_int_equal(roster_may_follow(&second, &first, &err), ERR_INTEGRITY);
    assert_int_equal(roster_may_follow(&second, &fork, &err), ERR_INTEGRITY);
    assert_int_equal(roster_may_follow(&first, &fork, &err), ERR_INTEGRITY);
    roster_release(&opened);
    for (size_t at = 0; at < a.len; at++) { /* every altered or truncated form is refused */
        a.data[at] ^= 4;
        assert_int_equal(roster_open(&opened, buffer_span(&a), governance.public_key, &err), ERR_INTEGRITY);
        a.data[at] ^= 4;
        assert_int_equal(roster_open(&opened, span_of(a.data, at), governance.public_key, &err), ERR_INTEGRITY);
    }
    assert_int_equal(roster_open(&opened, buffer_span(&a), author.public_key, &err), ERR_INTEGRITY);
    buffer_release(&a);
    buffer_release(&b);
    buffer_release(&c);
    roster_release(&first);
    roster_release(&second);
    roster_release(&fork);
}

static struct job_plan good_plan(void)
{
    struct job_plan p = {.job = "job-1", .lora = "x", .lora_len = 1, .rounds = 3, .min_sites = 5};

    p.train = (struct plan_train){"sgd", 0.1, 4, 8, 64, "system: keep\nline two"};
    p.dp = (struct plan_dp){PLAN_DP_RECORD, 1, 0.9, 0.04, 1e-5, 8, 1 << 20, 12};
    p.aggregation = (struct plan_aggregation){4, 32, 20, {SERVER_FEDAVG, 1, 0}};
    p.train_deadline_s = p.stage_deadline_s = 60;
    p.not_after_s = 1000;
    return p;
}

static void segments(void **state)
{
    (void)state;
    struct job_plan p = good_plan();
    struct model_segment s = {7, 7};

    for (uint32_t round = 1; round <= 4; round++) { /* no split: everything, always */
        assert_int_equal(job_plan_segment(&p, round, 100, &s, &err), 0);
        assert_true(s.offset == 0 && s.count == 100);
    }
    assert_int_equal(job_plan_vector_max(&p, 100), 100);
    p.split_words = 30; /* A: 30 words, B: 70 */
    assert_int_equal(job_plan_check(&p, &err), 0);
    for (uint32_t round = 1; round <= 6; round++) {
        assert_int_equal(job_plan_segment(&p, round, 100, &s, &err), 0);
        assert_true(round % 2 ? s.offset == 30 && s.count == 70 : s.offset == 0 && s.count == 30);
    }
    assert_int_equal(job_plan_vector_max(&p, 100), 70);
    assert_int_equal(job_plan_vector_max(&p, 50), 30);
    s = (struct model_segment){7, 7};
    for (uint64_t words = 0; words <= 30; words += 15) { /* nothing would be left for B */
        assert_int_equal(job_plan_segment(&p, 1, words, &s, &err), ERR_CONFIG);
        assert_non_null(strstr(err.message, "split_words"));
        assert_true(s.offset == 7 && s.count == 7);
    }
    assert_int_equal(job_plan_segment(&p, 1, 31, &s, &err), 0);
    assert_true(s.offset == 30 && s.count == 1);
    p.split_words = 0;
    assert_int_equal(job_plan_segment(&p, 1, 0, &s, &err), ERR_CONFIG);
    p.split_words = PLAN_WORDS_MAX;
    assert_int_equal(job_plan_check(&p, &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, "split_words"));
}

static void plans(void **state)
{
    (void)state;
    struct job_plan p = good_plan(), q;
    struct roster r;
    struct buffer signed_roster, b, other;

    p.split_words = 77;
    make_roster(&r, 1, NULL, &signed_roster);
    buffer_init(&b, 1 << 20);
    buffer_init(&other, 1 << 20);
    assert_int_equal(job_plan_sign(&p, &author, &b, &err), 0);
    assert_int_equal(job_plan_open(&q, buffer_span(&b), &r, &err), 0);
    assert_memory_equal(q.hash, p.hash, HASH_SIZE);
    assert_string_equal(q.train.options, "system: keep\nline two");
    assert_int_equal(q.split_words, 77);
    for (size_t at = 0; at < b.len; at++) {
        b.data[at] ^= 1;
        assert_true(job_plan_open(&q, buffer_span(&b), &r, &err) < 0);
        b.data[at] ^= 1;
        assert_true(job_plan_open(&q, span_of(b.data, at), &r, &err) < 0);
    }
    assert_int_equal(job_plan_sign(&p, &governance, &other, &err), 0);
    assert_int_equal(job_plan_open(&q, buffer_span(&other), &r, &err), ERR_POLICY); /* not an author */
    /* A plan of the version before split_words is named as what it is. */
    b.len -= SIGN_PUBLIC_SIZE + SIGN_SIZE;
    struct span old = buffer_span(&b);
    uint8_t signature[SIGN_SIZE];
    sign_parts(&author, "consilium/plan/v1", &old, 1, signature);
    buffer_append(&b, author.public_key, SIGN_PUBLIC_SIZE);
    buffer_append(&b, signature, SIGN_SIZE);
    assert_int_equal(job_plan_open(&q, buffer_span(&b), &r, &err), ERR_INTEGRITY);
    assert_non_null(strstr(err.message, "submit the job again"));
    p = good_plan();
    p.dp.steps = 11;
    assert_int_equal(job_plan_check(&p, &err), ERR_CONFIG);
    p = good_plan();
    p.dp.noise_multiplier = NAN;
    assert_int_equal(job_plan_check(&p, &err), ERR_CONFIG);
    p = good_plan();
    p.dp.mode = PLAN_DP_NONE; /* with values left in the fields */
    assert_int_equal(job_plan_check(&p, &err), ERR_CONFIG);
    p = good_plan();
    p.aggregation.optimizer.momentum = 0.5f;
    assert_int_equal(job_plan_check(&p, &err), ERR_CONFIG);
    buffer_release(&b);
    buffer_release(&other);
    buffer_release(&signed_roster);
    roster_release(&r);
}

int main(void)
{
    static const uint8_t key[RANDOM_SEED_SIZE] = {1};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quorum_table),      cmocka_unit_test(quantiser), cmocka_unit_test(rounding_is_unbiased),
        cmocka_unit_test(server_optimizers), cmocka_unit_test(rosters),   cmocka_unit_test(plans),
        cmocka_unit_test(segments),
    };

    random_stream_init(&stream, key, "test");
    rng = random_stream_rng(&stream);
    sign_key_random(&governance, &rng);
    sign_key_random(&author, &rng);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
