/* Whole rounds on real vectors: exact sums, dropouts at every stage (design test 21), the next model, proofs. */
#include "sim.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <cmocka.h>

#define EVERYBODY (~(uint64_t)0)

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void assert_sum_is_exact(const struct sim *s)
{
    const uint32_t *sum = secagg_server_sum(s->server);
    uint32_t survivors = 0;

    assert_non_null(sum);
    for (uint32_t i = 0; i < s->n; i++)
        survivors += secagg_server_is_survivor(s->server, s->sites[i].id);
    assert_int_equal(survivors, secagg_server_survivors(s->server));
    for (size_t j = 0; j < sim_segment(s).count; j++) {
        uint32_t expected = 0;
        for (uint32_t i = 0; i < s->n; i++) {
            if (secagg_server_is_survivor(s->server, s->sites[i].id))
                expected += s->sites[i].plain[j];
        }
        assert_int_equal(sum[j], expected);
    }
}

static void ok(struct sim *s, int rc)
{
    if (rc < 0)
        print_error("%s\n", s->err.message);
    assert_int_equal(rc, 0);
}

/* alive[k]: who answers at the k-th collected stage (M1, M3, M5, M7, M9). Returns the first close that fails. */
static int run_round(struct sim *s, const uint64_t alive[5])
{
    ok(s, sim_sites_join(s));
    for (int k = 0; k < 5; k++) {
        int rc = sim_stage(s, alive[k]);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static void sums_are_exact(void **state)
{
    static const struct {
        uint32_t n;
        size_t words;
    } cases[] = {{3, 1}, {5, 1025}, {10, 4099}, {32, 777}};

    for (size_t k = 0; k < ARRAY_LEN(cases); k++) {
        for (uint32_t suite = 1; suite <= 2; suite++) {
            static struct sim s;
            uint64_t all[5] = {EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY};
            sim_init(&s, cases[k].n, cases[k].words, *(uint64_t *)*state + k);
            s.suite = suite;
            ok(&s, run_round(&s, all));
            assert_sum_is_exact(&s);
            for (uint32_t i = 0; i < s.n; i++) /* what left the site was not its vector */
                assert_memory_not_equal(s.sites[i].masked, s.sites[i].plain, s.words * 4);
            sim_release(&s);
        }
    }
}

static void test_21_dropouts_at_each_stage(void **state)
{
    static const uint32_t sizes[] = {5, 10};

    for (size_t z = 0; z < ARRAY_LEN(sizes); z++) {
        for (int stage = 0; stage < 5; stage++) {
            struct quorum q;
            assert_int_equal(quorum_derive(&q, sizes[z], 0, 0, 0, NULL), 0);
            for (uint32_t drop = 1; drop <= q.n - q.t + 1; drop++) {
                static struct sim s;
                uint64_t alive[5];
                for (int k = 0; k < 5; k++) /* the first `drop` sites are silent from `stage` on */
                    alive[k] = k < stage ? EVERYBODY : EVERYBODY << drop;
                sim_init(&s, q.n, 101, *(uint64_t *)*state + drop);
                int rc = run_round(&s, alive);
                if (drop <= q.n - q.t) {
                    ok(&s, rc);
                    assert_sum_is_exact(&s);
                    assert_int_equal(secagg_server_dropouts_recovered(s.server), stage == 2 ? drop : 0);
                } else {
                    assert_int_equal(rc, ERR_AGAIN);
                    assert_null(secagg_server_sum(s.server));
                }
                sim_release(&s);
            }
        }
    }
}

static void test_22_late_vector_is_discarded(void **state)
{
    static struct sim s;
    struct span m5;
    uint8_t root[HASH_SIZE];

    sim_init(&s, 5, 513, *(uint64_t *)*state);
    ok(&s, sim_sites_join(&s));
    ok(&s, sim_stage(&s, EVERYBODY));
    ok(&s, sim_stage(&s, EVERYBODY));
    struct sim_site *late = &s.sites[0];
    ok(&s, secagg_client_on_deliver(late->client, secagg_server_broadcast(s.server, late->id), &s.err));
    memcpy(late->masked, late->plain, s.words * 4);
    ok(&s, secagg_client_mask(late->client, late->masked, root, &m5, &s.err));
    ok(&s, sim_stage(&s, EVERYBODY << 1));
    assert_int_equal(secagg_server_receive(s.server, late->id, m5, &s.err), ERR_AGAIN);
    assert_int_equal(secagg_server_add_vector(s.server, late->id, span_of(late->masked, s.words * 4), &s.err),
                     ERR_AGAIN);
    ok(&s, sim_stage(&s, EVERYBODY));
    ok(&s, sim_stage(&s, EVERYBODY));
    assert_sum_is_exact(&s);
    sim_release(&s);
}

static void test_23_everybody_at_the_clamp(void **state)
{
    static struct sim s;
    uint64_t all[5] = {EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY};
    int64_t m = ring_clamp(10, 0);

    sim_init(&s, 10, 64, *(uint64_t *)*state);
    for (uint32_t i = 0; i < s.n; i++) {
        for (size_t j = 0; j < s.words; j++)
            s.sites[i].plain[j] = (uint32_t)(j % 2 ? m : -m);
    }
    ok(&s, run_round(&s, all));
    for (size_t j = 0; j < s.words; j++)
        assert_int_equal((int32_t)secagg_server_sum(s.server)[j], j % 2 ? 10 * m : -10 * m);
    sim_release(&s);
}

static int finish(struct sim *s, uint32_t i, struct span m10, float *params, float *momentum,
                  struct secagg_result_out *out)
{
    struct secagg_result_in in = {.sum = secagg_server_sum(s->server),
                                  .previous = {s->params, s->momentum, s->words},
                                  .next_params = params,
                                  .next_momentum = momentum};

    memcpy(in.frozen_hash, s->frozen_hash, HASH_SIZE);
    return secagg_client_on_result(s->sites[i].client, m10, &in, out, &s->err);
}

static void test_33_next_model_and_proof(void **state)
{
    static struct sim s;
    static struct cosign_collector collector;
    uint64_t all[5] = {EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY};
    struct secagg_result_out out;
    struct cosign_statement statement;
    struct span m10;
    struct buffer proof;
    uint8_t next[HASH_SIZE], wrong[HASH_SIZE];

    memset(&collector, 0, sizeof collector);
    sim_init(&s, 5, 333, *(uint64_t *)*state);
    float *params = calloc(s.words, 4), *momentum = calloc(s.words, 4);
    ok(&s, run_round(&s, all));
    struct model_basis basis = job_plan_basis(&s.plan, s.frozen_hash);
    ok(&s, next_model_from_sum(&s.plan.aggregation.optimizer, (struct model_state){s.params, s.momentum, s.words},
                               sim_segment(&s), secagg_server_sum(s.server), 5, 20, params, momentum, &s.err));
    model_state_hash(&basis, (struct model_state){params, momentum, s.words}, next);

    memcpy(wrong, next, HASH_SIZE); /* a model that does not follow: every node refuses */
    wrong[0] ^= 1;
    ok(&s, secagg_server_result(s.server, wrong, &m10, &statement, &s.err));
    assert_int_equal(finish(&s, 4, m10, params, momentum, &out), ERR_INTEGRITY);

    ok(&s, secagg_server_result(s.server, next, &m10, &collector.statement, &s.err));
    collector.roster = &s.roster;
    collector.now_s = s.now_s;
    buffer_init(&proof, COSIGN_PROOF_MAX);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(cosign_proof(&collector, &proof, &s.err), ERR_AGAIN);
        ok(&s, finish(&s, i, m10, params, momentum, &out));
        ok(&s, cosign_collect(&collector, s.sites[i].id, out.signature, &s.err));
        ok(&s, cosign_collect(&collector, s.sites[i].id, out.signature, &s.err)); /* a repeat counts once */
    }
    assert_int_equal(cosign_collect(&collector, s.sites[4].id, out.signature, &s.err), ERR_INTEGRITY);
    ok(&s, cosign_proof(&collector, &proof, &s.err));
    ok(&s, cosign_verify(buffer_span(&proof), &s.roster, s.now_s, 0, &statement, &s.err));
    assert_memory_equal(statement.next_hash, next, HASH_SIZE);
    assert_int_equal(cosign_verify(buffer_span(&proof), &s.roster, s.now_s, 2, &statement, &s.err), ERR_POLICY);
    for (size_t at = 0; at < proof.len; at++) {
        proof.data[at] ^= 1;
        assert_true(cosign_verify(buffer_span(&proof), &s.roster, s.now_s, 0, &statement, &s.err) < 0);
        proof.data[at] ^= 1;
    }
    buffer_release(&proof);
    free(params);
    free(momentum);
    sim_release(&s);
}

/* A then the other half: only the round's own half is masked, summed and moved, everybody recomputes it, and a model in
 * which another half moved is refused. */
static void halves_in_turn(void **state)
{
    enum { N = 5, A = 120, B = 213, WORDS = A + B, ROUNDS = 4 };
    static struct sim s;
    uint64_t all[5] = {EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY};
    float *params = calloc(WORDS, 4), *momentum = calloc(WORDS, 4), *expected = calloc(2 * WORDS, 4);

    sim_init_split(&s, N, WORDS, A, *(uint64_t *)*state);
    const struct server_optimizer *optimizer = &s.plan.aggregation.optimizer;
    const struct model_basis basis = job_plan_basis(&s.plan, s.frozen_hash);
    for (s.round = 1; s.round <= ROUNDS; s.round++) {
        const struct model_segment half = s.round % 2 ? (struct model_segment){A, B} : (struct model_segment){0, A};
        const struct model_segment other = s.round % 2 ? (struct model_segment){0, A} : (struct model_segment){A, B};
        const uint64_t alive[5] = {all[0], all[1], s.round == 3 ? EVERYBODY << 1 : all[2], all[3], all[4]};
        const struct model_state before = {s.params, s.momentum, WORDS};
        struct secagg_result_out out;
        struct cosign_statement statement;
        struct span m10;
        uint8_t next[HASH_SIZE];

        ok(&s, run_round(&s, alive));
        assert_int_equal(secagg_server_segment(s.server).offset, half.offset);
        assert_int_equal(secagg_server_segment(s.server).count, half.count);
        assert_sum_is_exact(&s);
        const uint32_t *sum = secagg_server_sum(s.server), survivors = secagg_server_survivors(s.server);
        assert_int_equal(survivors, s.round == 3 ? N - 1 : N);

        /* By hand: FedAvgM (lr 1, momentum 0.9) on the half; the rest as it was. */
        for (size_t i = 0; i < WORDS; i++) {
            const bool moves = i >= half.offset && i < half.offset + half.count;
            expected[i] = s.params[i];
            expected[WORDS + i] = s.momentum[i];
            if (!moves)
                continue;
            const float average = (float)((double)(int32_t)sum[i - half.offset] / survivors / 0x1p20);
            const float kept = 0.9f * s.momentum[i];
            expected[WORDS + i] = kept + average;
            expected[i] = s.params[i] + expected[WORDS + i];
        }

        /* The sum of A taken for B's half, or the other way round, as far as it reaches. */
        const struct model_segment wrong = {other.offset, other.count < half.count ? other.count : half.count};
        ok(&s, next_model_from_sum(optimizer, before, wrong, sum, survivors, 20, params, momentum, &s.err));
        model_state_hash(&basis, (struct model_state){params, momentum, WORDS}, next);
        ok(&s, secagg_server_result(s.server, next, &m10, &statement, &s.err));
        assert_int_equal(finish(&s, N - 1, m10, params, momentum, &out), ERR_INTEGRITY);
        assert_non_null(strstr(s.err.message, "does not follow"));

        ok(&s, next_model_from_sum(optimizer, before, half, sum, survivors, 20, params, momentum, &s.err));
        assert_memory_equal(params, expected, WORDS * 4);
        assert_memory_equal(momentum, expected + WORDS, WORDS * 4);
        model_state_hash(&basis, (struct model_state){params, momentum, WORDS}, next);
        ok(&s, secagg_server_result(s.server, next, &m10, &statement, &s.err));
        for (uint32_t i = 1; i < N - 1; i++) {
            memset(params, 0xff, WORDS * 4);
            memset(momentum, 0xff, WORDS * 4);
            ok(&s, finish(&s, i, m10, params, momentum, &out));
            assert_memory_equal(params, expected, WORDS * 4);
            assert_memory_equal(momentum, expected + WORDS, WORDS * 4);
        }
        /* In place: the aggregator's own arrays may be the outputs. */
        ok(&s, next_model_from_sum(optimizer, before, half, sum, survivors, 20, s.params, s.momentum, &s.err));
        assert_memory_equal(s.params, expected, WORDS * 4);
        assert_memory_equal(s.momentum, expected + WORDS, WORDS * 4);
        memcpy(s.model_hash, next, HASH_SIZE);
        sim_drop_clients(&s);
    }
    for (size_t i = 0; i < WORDS; i++)
        assert_true(s.params[i] != 0); /* both halves moved */
    free(params);
    free(momentum);
    free(expected);
    sim_release(&s);
}

static void timing(void **state)
{
    static struct sim s;

    sim_init(&s, 5, 100000, *(uint64_t *)*state);
    double start = now(), last = start;
    ok(&s, sim_sites_join(&s));
    printf("n=5 d=100k: M0 %.1f ms", (now() - last) * 1e3);
    for (int k = 0; k < 5; k++) {
        last = now();
        ok(&s, sim_stage(&s, EVERYBODY));
        printf(", M%d %.1f", 2 * k + 1, (now() - last) * 1e3);
    }
    printf(", all sites and server %.1f ms\n", (now() - start) * 1e3);
    assert_sum_is_exact(&s);
    sim_release(&s);
}

int main(void)
{
    static uint64_t seed;
#define SEEDED(f)                                                                                                      \
    {                                                                                                                  \
#f, f, NULL, NULL, &seed                                                                                       \
    }
    const struct CMUnitTest tests[] = {
        SEEDED(sums_are_exact),
        SEEDED(test_21_dropouts_at_each_stage),
        SEEDED(test_22_late_vector_is_discarded),
        SEEDED(test_23_everybody_at_the_clamp),
        SEEDED(test_33_next_model_and_proof),
        SEEDED(halves_in_turn),
        SEEDED(timing),
    };

    seed = sim_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
