/* The design's adversarial tests, by number, with a malicious aggregator that holds its own signing key. */
#include "sim.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#define EVERYBODY (~(uint64_t)0)

static struct sim s;
static struct span answer;

static int start(void **state)
{
    sim_init(&s, 5, 257, *(uint64_t *)*state);
    return sim_sites_join(&s);
}

static int stop(void **state)
{
    (void)state;
    sim_release(&s);
    return 0;
}

static struct span cast(uint32_t i)
{
    return secagg_server_broadcast(s.server, s.sites[i].id);
}

static void ok(int rc)
{
    if (rc < 0)
        print_error("%s\n", s.err.message);
    assert_int_equal(rc, 0);
}

static void to_stage(enum secagg_stage stage)
{
    while (secagg_server_stage(s.server) != stage)
        ok(sim_stage(&s, EVERYBODY));
}

/* Site i gets the present broadcast with one byte changed at `at` and a fresh signature of the aggregator. */
static int feed_altered(uint32_t i, size_t at)
{
    struct buffer b;
    sim_copy_body(&b, cast(i));
    b.data[at] ^= 1;
    sim_resign(&s, &b);
    int rc = sim_answer(&s, i, buffer_span(&b), &answer);
    buffer_release(&b);
    return rc;
}

static void test_01_swapped_key_in_m2(void **state)
{
    (void)state;
    to_stage(STAGE_SHARES);
    /* head 1 + 32, count 4, id 4 + 9, advert length 4, its head 33, its id 13: the first key */
    assert_int_equal(feed_altered(1, 33 + 4 + 13 + 4 + 33 + 13), ERR_INTEGRITY);
    assert_non_null(strstr(s.err.message, "signature of site clinic-00"));
    assert_int_equal(sim_answer(&s, 1, cast(1), &answer), ERR_FAILED); /* dead: nothing was dealt */
}

static void test_02_stranger_revoked_expired(void **state)
{
    (void)state;
    struct span m0 = cast(0);
    sim_drop_clients(&s);
    ok(sim_open_server(&s));
    m0 = cast(0);
    struct roster_site *site = &s.roster.sites[1];
    const struct roster_site *found;
    s.attempt = 2;
    site->certificate_not_after_s = s.now_s - 1;
    assert_int_equal(roster_admit(&s.roster, "clinic-01", s.now_s, &found, &s.err), ERR_POLICY);
    site->certificate_not_after_s = s.now_s + 10;
    ok(roster_revoke(&s.roster, site->certificate_hash, &s.err));
    assert_int_equal(roster_admit(&s.roster, "clinic-01", s.now_s, &found, &s.err), ERR_POLICY);
    assert_int_equal(roster_admit(&s.roster, "stranger", s.now_s, &found, &s.err), ERR_POLICY);
    secagg_server_free(s.server);
    s.server = NULL;
    assert_int_equal(sim_open_server(&s), ERR_POLICY);
    (void)m0;
}

/* Another site's key in an advert that its owner really signed. */
static void test_03_duplicated_and_low_order_keys(void **state)
{
    (void)state;
    for (int low_order = 0; low_order < 2; low_order++) {
        struct buffer b;
        struct span m1;
        uint8_t signature[SIGN_SIZE];
        struct sim_site *evil = &s.sites[1];
        if (low_order) {
            stop(NULL);
            sim_init(&s, 5, 257, 7);
            ok(sim_sites_join(&s));
        }
        ok(secagg_client_advertise(s.sites[0].client, &m1, &s.err));
        struct span theirs;
        ok(secagg_client_advertise(s.sites[1].client, &theirs, &s.err));
        sim_copy_body(&b, theirs);
        if (low_order)
            memset(b.data + 33 + 13, 0, AGREE_SIZE);
        else
            memcpy(b.data + 33 + 13, m1.ptr + 33 + 13, AGREE_SIZE);
        stage_sign(1, evil->id, secagg_client_info(evil->client)->h0, buffer_span(&b), &evil->key, signature);
        buffer_append(&b, signature, SIGN_SIZE);
        int rc = secagg_server_receive(s.server, evil->id, buffer_span(&b), &s.err);
        buffer_release(&b);
        if (low_order) {
            assert_int_equal(rc, ERR_INTEGRITY);
        } else {
            ok(rc);
            assert_int_equal(sim_stage(&s, EVERYBODY), ERR_INTEGRITY); /* the honest server refuses as well */
            assert_int_equal(secagg_server_stage(s.server), STAGE_DEAD);
        }
    }
}

static void test_04_own_entry_left_out(void **state)
{
    (void)state;
    struct buffer b;
    to_stage(STAGE_SHARES);
    struct span m2 = cast(0);
    size_t entry = 4 + 9 + 4 + s.sites[0].client->out[1].len;
    sim_copy_body(&b, m2);
    b.data[33] = 4; /* count; the first entry is site 0's */
    memmove(b.data + 37, b.data + 37 + entry, b.len - 37 - entry);
    b.len -= entry;
    sim_resign(&s, &b);
    assert_int_equal(sim_answer(&s, 0, buffer_span(&b), &answer), ERR_INTEGRITY);
    assert_non_null(strstr(s.err.message, "left out"));
    buffer_release(&b);
}

static void test_05_floors(void **state)
{
    (void)state;
    sim_drop_clients(&s);
    s.attempt = 2;
    ok(sim_open_server(&s));
    s.policy.colluders_min = 2;
    assert_int_equal(sim_join(&s, 0, cast(0)), ERR_POLICY);
    s.policy = (struct secagg_policy){.honest_min = 4};
    assert_int_equal(sim_join(&s, 0, cast(0)), ERR_POLICY);
    s.policy = (struct secagg_policy){.sites_min = 6};
    assert_int_equal(sim_join(&s, 0, cast(0)), ERR_POLICY);
    s.policy = (struct secagg_policy){0};
    /* t = 1, and c and m of another value than the plan's: the four words after the graph */
    struct span m0 = cast(0);
    size_t tail = SIGN_SIZE + 5 * 13 + 4 + 4 * 4 + 4 * 4; /* ids, n, chunk deadlines suite, t c m n_min */
    for (int word = 0; word < 4; word++) {
        struct buffer b;
        sim_copy_body(&b, m0);
        b.data[m0.len - tail + 4 * (size_t)word] = word == 0 ? 1 : 0;
        sim_resign(&s, &b);
        assert_int_equal(sim_join(&s, 0, buffer_span(&b)), ERR_POLICY);
        buffer_release(&b);
    }
    ok(sim_join(&s, 0, m0));
}

static void test_06_two_openings(void **state)
{
    (void)state;
    struct span theirs;
    struct secagg_server *first = s.server;
    s.attempt = 2;
    s.server = NULL;
    ok(sim_open_server(&s)); /* another nonce, attempt: another H0, shown to site 1 only */
    secagg_client_free(s.sites[1].client);
    ok(sim_join(&s, 1, cast(1)));
    ok(secagg_client_advertise(s.sites[1].client, &theirs, &s.err));
    assert_int_equal(secagg_server_receive(first, s.sites[1].id, theirs, &s.err), ERR_INTEGRITY);
    secagg_server_free(s.server);
    s.server = first;
    ok(sim_stage(&s, EVERYBODY & ~2ull));
    assert_int_equal(secagg_client_on_keys(s.sites[1].client, cast(0), &answer, &s.err), ERR_INTEGRITY);
}

static void test_07_other_model_or_consent(void **state)
{
    (void)state;
    uint8_t keep = s.model_hash[0];
    sim_drop_clients(&s);
    s.attempt = 2;
    ok(sim_open_server(&s));
    s.model_hash[0] ^= 1;
    assert_int_equal(sim_join(&s, 0, cast(0)), ERR_INTEGRITY);
    s.model_hash[0] = keep;
    s.plan.hash[0] ^= 1;
    assert_int_equal(sim_join(&s, 0, cast(0)), ERR_POLICY);
}

static void test_09_10_second_survivor_list(void **state)
{
    (void)state;
    struct buffer b;
    to_stage(STAGE_CONSISTENCY);
    ok(sim_answer(&s, 1, cast(1), &answer));
    struct span again;
    ok(sim_answer(&s, 1, cast(1), &again)); /* the same request: the same bytes */
    assert_true(span_equal(answer, again));
    size_t entry = 4 + 9 + HASH_SIZE + SIGN_SIZE;
    sim_copy_body(&b, cast(1)); /* without site 0: valid on its own, four survivors */
    b.data[33] = 4;
    memmove(b.data + 37, b.data + 37 + entry, b.len - 37 - entry);
    b.len -= entry;
    sim_resign(&s, &b);
    assert_int_equal(sim_answer(&s, 1, buffer_span(&b), &answer), ERR_INTEGRITY);
    assert_non_null(strstr(s.err.message, "equivocates"));
    /* its quorum request is not answered any more, alive or dead lists alike */
    assert_int_equal(secagg_client_on_quorum(s.sites[1].client, buffer_span(&b), &answer, &s.err), ERR_FAILED);
    buffer_release(&b);
}

static void test_11_quorum_short_repeated_foreign(void **state)
{
    (void)state;
    to_stage(STAGE_UNMASK);
    size_t entry = 4 + 9 + SIGN_SIZE;
    for (uint32_t kind = 0; kind < 3; kind++) {
        struct buffer b;
        sim_copy_body(&b, cast(kind));
        if (kind == 0) { /* t - 1 = 3 */
            b.data[33] = 3;
            b.len = 37 + 3 * entry;
        } else if (kind == 1) { /* one signature twice */
            memcpy(b.data + 37 + entry, b.data + 37, entry);
        } else { /* not a signature on this H3 */
            b.data[37 + 13] ^= 1;
        }
        sim_resign(&s, &b);
        assert_int_equal(sim_answer(&s, kind, buffer_span(&b), &answer), kind == 0 ? ERR_POLICY : ERR_INTEGRITY);
        assert_false(s.sites[kind].has_m9);
        buffer_release(&b);
    }
}

static void test_12_13_survivors_below_floor_or_fabricated(void **state)
{
    (void)state;
    struct buffer b;
    size_t entry = 4 + 9 + HASH_SIZE + SIGN_SIZE;
    to_stage(STAGE_CONSISTENCY);
    sim_copy_body(&b, cast(0));
    b.data[33] = 3;
    b.len = 37 + 3 * entry;
    sim_resign(&s, &b);
    assert_int_equal(sim_answer(&s, 0, buffer_span(&b), &answer), ERR_POLICY);
    buffer_release(&b);
    assert_int_equal(feed_altered(1, 37 + 13), ERR_INTEGRITY); /* a root that site 0 did not sign */
    assert_non_null(strstr(s.err.message, "fabricated"));
    assert_false(s.sites[0].has_h3 || s.sites[1].has_h3);
}

static void test_14_unmask_once(void **state)
{
    (void)state;
    struct span again;
    to_stage(STAGE_UNMASK);
    ok(sim_answer(&s, 2, cast(2), &answer));
    ok(sim_answer(&s, 2, cast(2), &again));
    assert_true(span_equal(answer, again));
    assert_int_equal(feed_altered(2, 37 + 13), ERR_INTEGRITY);
    s.attempt = 2; /* another attempt of the same round: the record refuses a second, different M9 */
    sim_drop_clients(&s);
    ok(sim_sites_join(&s));
    for (int k = 0; k < 4; k++)
        ok(sim_stage(&s, EVERYBODY));
    assert_int_equal(sim_answer(&s, 2, cast(2), &answer), ERR_INTEGRITY);
}

/* Two rounds from one model: the difference of their sums would be a single site's update. With DP the noise of each
 * round is fresh, without it nothing hides the difference. */
static void test_14_unmask_a_model_once_without_dp(void **state)
{
    (void)state;
    for (int with_dp = 1; with_dp >= 0; with_dp--) {
        if (!with_dp)
            s.plan.dp = (struct plan_dp){.mode = PLAN_DP_NONE};
        s.policy.allow_no_dp = true;
        buffer_clear(&s.signed_plan);
        ok(job_plan_sign(&s.plan, &s.author, &s.signed_plan, &s.err));
        for (int again = 0; again < 2; again++) {
            sim_drop_clients(&s);
            s.round++;
            ok(sim_sites_join(&s));
            to_stage(STAGE_UNMASK);
            int rc = sim_answer(&s, 0, cast(0), &answer);
            assert_int_equal(rc, with_dp || !again ? 0 : ERR_INTEGRITY);
        }
    }
    s.model_hash[0] ^= 1; /* the next version */
    sim_drop_clients(&s);
    s.round++;
    ok(sim_sites_join(&s));
    to_stage(STAGE_UNMASK);
    ok(sim_answer(&s, 0, cast(0), &answer));
}

static void test_15_16_replay_and_restart(void **state)
{
    (void)state;
    struct buffer m0;
    buffer_init(&m0, MESSAGE_MAX);
    buffer_append(&m0, cast(0).ptr, cast(0).len);
    secagg_client_free(s.sites[0].client); /* a crash; the same opening is refused after the restart */
    s.sites[0].client = NULL;
    assert_int_equal(sim_join(&s, 0, buffer_span(&m0)), ERR_INTEGRITY);
    buffer_release(&m0);
    ok(sim_stage(&s, EVERYBODY & ~1ull));
    struct buffer m2;
    buffer_init(&m2, MESSAGE_MAX);
    buffer_append(&m2, cast(1).ptr, cast(1).len);
    s.round = 2;
    sim_drop_clients(&s);
    ok(sim_sites_join(&s));
    ok(sim_stage(&s, EVERYBODY));
    assert_int_equal(sim_answer(&s, 1, buffer_span(&m2), &answer), ERR_INTEGRITY); /* round 1's M2 */
    buffer_release(&m2);
}

static void test_17_ledger_of_a_peer_went_back(void **state)
{
    (void)state;
    to_stage(STAGE_SHARES);
    s.sites[3].witness_sequence = 5; /* this site has seen sequence 5 from its peers */
    assert_int_equal(sim_answer(&s, 3, cast(3), &answer), ERR_INTEGRITY);
    assert_non_null(strstr(s.err.message, "ledger"));
}

static void test_18_share_flipped_or_redirected(void **state)
{
    (void)state;
    to_stage(STAGE_MASKED);
    size_t first = 37 + 13 + HASH_SIZE + SIGN_SIZE + 4; /* the box of dealer 0 for site 1 */
    assert_int_equal(feed_altered(1, first + 5), ERR_INTEGRITY);
    assert_int_equal(feed_altered(3, cast(3).len - SIGN_SIZE - 1), ERR_INTEGRITY); /* the Merkle path */
    assert_non_null(strstr(s.err.message, "not under its signed digest"));
    struct span one = cast(1); /* site 2 gets what was dealt to site 1 */
    assert_int_equal(sim_answer(&s, 2, one, &answer), ERR_INTEGRITY);
}

static void test_19_wrong_share_in_m9(void **state)
{
    (void)state;
    struct buffer b;
    uint8_t signature[SIGN_SIZE];
    to_stage(STAGE_UNMASK);
    ok(sim_answer(&s, 3, cast(3), &answer));
    sim_copy_body(&b, answer);
    b.data[37] ^= 1;
    stage_sign(9, s.sites[3].id, s.sites[3].client->a.h3, buffer_span(&b), &s.sites[3].key, signature);
    buffer_append(&b, signature, SIGN_SIZE);
    assert_int_equal(secagg_server_receive(s.server, s.sites[3].id, buffer_span(&b), &s.err), ERR_INTEGRITY);
    assert_non_null(strstr(s.err.message, "clinic-03")); /* the culprit is named, the others finish without it */
    ok(sim_stage(&s, EVERYBODY & ~8ull));
    buffer_release(&b);
}

static void test_20_inconsistent_dealer(void **state)
{
    (void)state;
    ok(sim_stage(&s, EVERYBODY));
    s.sites[0].client->secret->b[0] ^= 1; /* deals another secret than the one it committed to */
    for (int k = 0; k < 3; k++)
        ok(sim_stage(&s, EVERYBODY));
    assert_int_equal(sim_stage(&s, EVERYBODY), ERR_INTEGRITY);
    assert_non_null(strstr(s.err.message, "clinic-00"));
    assert_null(secagg_server_sum(s.server));
}

static void test_25_vector_altered_or_short(void **state)
{
    (void)state;
    to_stage(STAGE_MASKED);
    struct sim_site *site = &s.sites[0];
    ok(sim_answer(&s, 0, cast(0), &answer));
    ok(secagg_server_receive(s.server, site->id, answer, &s.err));
    struct span bytes = span_of(site->masked, s.words * 4 - 4);
    assert_int_equal(secagg_server_add_vector(s.server, site->id, bytes, &s.err), ERR_INTEGRITY);
    bytes.len += 4;
    site->masked[3] ^= 1;
    assert_int_equal(secagg_server_add_vector(s.server, site->id, bytes, &s.err), ERR_INTEGRITY);
    site->masked[3] ^= 1;
    ok(secagg_server_add_vector(s.server, site->id, bytes, &s.err));
    ok(sim_stage(&s, EVERYBODY));
}

/* A job whose rounds move the state's first 100 words and the other 157 in turn. */
static void test_26_other_half_or_size_of_the_state(void **state)
{
    enum { A = 100, WORDS = 257 };
    static const uint64_t sizes[] = {0, A, A + 1, WORDS - A, WORDS - 1, WORDS + 1, (uint64_t)PLAN_WORDS_MAX + 1};
    stop(NULL);
    sim_init_split(&s, 5, WORDS, A, *(uint64_t *)*state);
    ok(sim_open_server(&s));
    const struct span m0 = cast(0);
    const size_t at =
        1 + (4 + strlen("demo")) + (4 + strlen("icd-demo")) + 4 + 4 + 3 * HASH_SIZE + 4 + s.signed_plan.len;
    for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
        struct buffer b;
        sim_copy_body(&b, m0);
        assert_int_equal(b.data[at] | b.data[at + 1] << 8, WORDS);
        memcpy(b.data + at, &sizes[i], sizeof sizes[i]);
        sim_resign(&s, &b);
        assert_int_equal(sim_join(&s, 0, buffer_span(&b)), ERR_INTEGRITY);
        buffer_release(&b);
    }
    for (uint32_t i = 0; i < s.n; i++)
        ok(sim_join(&s, i, cast(i)));
    to_stage(STAGE_MASKED);
    struct sim_site *site = &s.sites[0];
    ok(sim_answer(&s, 0, cast(0), &answer));
    ok(secagg_server_receive(s.server, site->id, answer, &s.err));
    assert_int_equal(secagg_server_add_vector(s.server, site->id, span_of(site->masked, A * 4), &s.err), ERR_INTEGRITY);
    assert_int_equal(secagg_server_add_vector(s.server, site->id, span_of(site->masked, WORDS * 4), &s.err),
                     ERR_INTEGRITY);
    ok(secagg_server_add_vector(s.server, site->id, span_of(site->masked, (WORDS - A) * 4), &s.err));
    ok(sim_stage(&s, EVERYBODY));
}

static void test_28_other_roster(void **state)
{
    (void)state;
    sim_drop_clients(&s);
    s.attempt = 2;
    ok(sim_open_server(&s));
    s.roster.hash[0] ^= 1;
    assert_int_equal(sim_join(&s, 0, cast(0)), ERR_INTEGRITY);
}

static void wrong_order_is_an_error(void **state)
{
    (void)state;
    uint8_t root[HASH_SIZE];
    assert_int_equal(secagg_client_mask(s.sites[0].client, s.sites[0].masked, root, &answer, &s.err), ERR_FAILED);
    assert_int_equal(secagg_client_on_quorum(s.sites[0].client, cast(0), &answer, &s.err), ERR_FAILED);
    ok(sim_stage(&s, EVERYBODY)); /* it did no harm */
}

int main(void)
{
    static uint64_t seed;
#define SEEDED(f)                                                                                                      \
    {                                                                                                                  \
#f, f, start, stop, &seed                                                                                      \
    }
    const struct CMUnitTest tests[] = {
        SEEDED(test_01_swapped_key_in_m2),
        SEEDED(test_02_stranger_revoked_expired),
        SEEDED(test_03_duplicated_and_low_order_keys),
        SEEDED(test_04_own_entry_left_out),
        SEEDED(test_05_floors),
        SEEDED(test_06_two_openings),
        SEEDED(test_07_other_model_or_consent),
        SEEDED(test_09_10_second_survivor_list),
        SEEDED(test_11_quorum_short_repeated_foreign),
        SEEDED(test_12_13_survivors_below_floor_or_fabricated),
        SEEDED(test_14_unmask_once),
        SEEDED(test_14_unmask_a_model_once_without_dp),
        SEEDED(test_15_16_replay_and_restart),
        SEEDED(test_17_ledger_of_a_peer_went_back),
        SEEDED(test_18_share_flipped_or_redirected),
        SEEDED(test_19_wrong_share_in_m9),
        SEEDED(test_20_inconsistent_dealer),
        SEEDED(test_25_vector_altered_or_short),
        SEEDED(test_26_other_half_or_size_of_the_state),
        SEEDED(test_28_other_roster),
        SEEDED(wrong_order_is_an_error),
    };

    seed = sim_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
