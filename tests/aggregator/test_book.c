/* The aggregator's durable book: what a restart finds. */
#include "aggregator/rounds/book.h"
#include "aggregator/settings.h"
#include "tests/aggregator/federation_fixture.h"

#include <stdio.h>
#include <unistd.h>

#define WORDS 5

static struct fixture_federation f;
static struct book *book;

static void reopen(void)
{
    struct error err = {0};
    book_close(book);
    if (book_open(&book, f.aggregator, &err) < 0)
        fail_msg("%s", err.message);
}

static int set_up(void **state)
{
    (void)state;
    book = NULL;
    fixture_federation_open(&f, "test");
    reopen();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    book_close(book);
    fixture_federation_release(&f);
    return 0;
}

static struct book_job job(const char *name)
{
    struct book_job row = {0};
    struct error err = {0};
    if (book_job(book, name, &row, &err) < 0)
        fail_msg("%s", err.message);
    return row;
}

static void add_version(const char *name, uint32_t round, float value)
{
    float state[2 * WORDS];
    struct book_version v = {.round = round, .survivors = 4};
    struct error err = {0};
    for (size_t i = 0; i < 2 * WORDS; i++)
        state[i] = value + (float)i;
    hash_bytes(span_of(state, sizeof state), v.state_sha256);
    assert_int_equal(book_add_version(book, name, &v, state, WORDS, &err), 0);
}

static void jobs_come_in_order_and_names_are_used_once(void **state)
{
    struct book_job row;
    struct error err = {0};
    struct buffer plan;
    (void)state;
    assert_int_equal(book_next_job(book, &row, &err), ERR_NOT_FOUND);
    assert_int_equal(book_add_job(book, "first", WORDS, span_str("plan one"), &err), 0);
    assert_int_equal(book_add_job(book, "second", WORDS, span_str("plan two"), &err), 0);
    assert_int_equal(book_add_job(book, "first", WORDS, span_str("again"), &err), ERR_EXISTS);
    assert_int_equal(book_next_job(book, &row, &err), 0);
    assert_string_equal(row.job, "first");
    assert_int_equal(book_set_state(book, "second", JOB_RUNNING, "", &err), 0);
    assert_int_equal(book_next_job(book, &row, &err), 0);
    assert_string_equal(row.job, "second"); /* one under way goes on first */
    assert_int_equal(book_set_state(book, "second", JOB_FAILED, "of the test", &err), 0);
    reopen();
    assert_string_equal(job("second").reason, "of the test");
    assert_int_equal(book_next_job(book, &row, &err), 0);
    assert_string_equal(row.job, "first");
    buffer_init(&plan, 100);
    assert_int_equal(book_plan(book, "second", &plan, &err), 0);
    assert_memory_equal(plan.data, "plan two", 8);
    assert_int_equal(book_plan(book, "third", &plan, &err), ERR_NOT_FOUND);
    buffer_release(&plan);
}

static void round_numbers_are_never_used_again(void **state)
{
    struct error err = {0};
    uint32_t round = 0;
    (void)state;
    assert_int_equal(book_open_round(book, "none", &round, &err), ERR_NOT_FOUND);
    assert_int_equal(book_add_job(book, "j", WORDS, span_str("plan"), &err), 0);
    for (uint32_t expected = 1; expected <= 6; expected++) {
        assert_int_equal(book_open_round(book, "j", &round, &err), 0);
        assert_int_equal(round, expected);
        if (expected % 2)
            reopen();
        assert_int_equal(job("j").rounds_opened, expected);
    }
}

static void a_state_is_read_back_bit_for_bit_or_not_at_all(void **state)
{
    float got[2 * WORDS];
    struct error err = {0};
    char path[AGGREGATOR_PATH_SIZE];
    (void)state;
    assert_int_equal(book_add_job(book, "j", WORDS, span_str("plan"), &err), 0);
    memset(got, 0xff, sizeof got);
    assert_int_equal(book_state(book, "j", 0, got, WORDS, &err), 0);
    for (size_t i = 0; i < 2 * WORDS; i++)
        assert_true(got[i] == 0);
    add_version("j", 2, 0.5f);
    reopen();
    assert_int_equal(job("j").version, 2);
    assert_int_equal(book_state(book, "j", 2, got, WORDS, &err), 0);
    for (size_t i = 0; i < 2 * WORDS; i++)
        assert_true(got[i] == 0.5f + (float)i);
    assert_int_equal(book_state(book, "j", 1, got, WORDS, &err), ERR_NOT_FOUND);
    aggregator_path(f.aggregator, "models/j/000002.state", path);
    for (long at = 0; at < (long)sizeof got; at++) { /* every byte */
        FILE *file = fopen(path, "r+b");
        assert_non_null(file);
        fseek(file, at, SEEK_SET);
        const int byte = fgetc(file);
        fseek(file, at, SEEK_SET);
        fputc(byte ^ 0x10, file);
        fclose(file);
        assert_int_equal(book_state(book, "j", 2, got, WORDS, &err), ERR_INTEGRITY);
        file = fopen(path, "r+b");
        fseek(file, at, SEEK_SET);
        fputc(byte, file);
        fclose(file);
    }
    assert_int_equal(book_state(book, "j", 2, got, WORDS, &err), 0);
    assert_int_equal(truncate(path, 8), 0);
    assert_int_equal(book_state(book, "j", 2, got, WORDS, &err), ERR_INTEGRITY);
}

static int count(void *ctx, const struct book_version *v)
{
    uint32_t *seen = ctx;
    seen[0]++;
    seen[1] += v->proven;
    return 0;
}

static void what_no_quorum_vouched_for_is_withdrawn(void **state)
{
    uint8_t hash[HASH_SIZE];
    uint32_t seen[2] = {0};
    struct buffer proof;
    struct error err = {0};
    struct book_job row;
    (void)state;
    buffer_init(&proof, 100);
    assert_int_equal(book_add_job(book, "j", WORDS, span_str("plan"), &err), 0);
    assert_int_equal(book_add_job(book, "other", WORDS, span_str("plan"), &err), 0);
    add_version("other", 1, 3);
    add_version("j", 1, 1);
    assert_int_equal(book_proof(book, "j", 1, &proof, hash, &err), ERR_NOT_FOUND);
    assert_int_equal(book_set_proof(book, "j", 1, span_str("proof"), &err), 0);
    assert_int_equal(book_proof(book, "j", 1, &proof, hash, &err), 0);
    assert_memory_equal(proof.data, "proof", 5);
    add_version("j", 4, 2);
    reopen();
    row = job("j");
    assert_int_equal(row.version, 4);
    assert_int_equal(book_withdraw(book, &row, &err), 0);
    assert_int_equal(row.version, 1);
    assert_int_equal(job("j").version, 1);
    assert_int_equal(book_each_version(book, "j", count, seen, &err), 0);
    assert_int_equal(seen[0], 1);
    assert_int_equal(seen[1], 1);
    assert_int_equal(book_withdraw(book, &row, &err), 0); /* nothing left to withdraw */
    assert_int_equal(row.version, 1);
    assert_int_equal(job("other").version, 1); /* other jobs keep theirs */
    buffer_release(&proof);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(jobs_come_in_order_and_names_are_used_once, set_up, tear_down),
        cmocka_unit_test_setup_teardown(round_numbers_are_never_used_again, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_state_is_read_back_bit_for_bit_or_not_at_all, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_no_quorum_vouched_for_is_withdrawn, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
