/* The real model answers through the answerer; prints its speed. Skipped (77) where the file is not there. */
#include "crypto/random.h"
#include "node/serve/answer.h"
#include "tests/formats/fixtures.h"
#include "tests/node/tiny_site.h"

static void count_pieces(void *ctx, struct span text)
{
    (void)text;
    ++*(int *)ctx;
}

static void test_question(void **state)
{
    struct tiny_site t;
    struct answerer *answerer;
    struct answer answer;
    struct error err = {0};
    int pieces = 0;
    struct chat_message messages[] = {{CHAT_USER, span_str("What is the capital of France?")}};
    struct answer_request request = {
        .messages = messages, .message_count = 1, .tokens_max = 200, .piece = count_pieces, .ctx = &pieces};

    tiny_site_open(&t, NULL, *state);
    assert_int_equal(answerer_new(&answerer, &t.site, 2048, &random_system, &clock_system, &err), 0);
    if (answerer_run(answerer, NULL, &request, &answer, &err) < 0)
        fail_msg("%s", err.message);
    assert_non_null(memmem(answer.text.data, answer.text.len, "Paris", 5));
    assert_int_equal(answer.finish, ANSWER_STOP);
    assert_true(pieces > 1 && pieces <= answer.answer_tokens);
    assert_int_equal(answer.source.version, 0);
    answer_release(&answer);

    messages[0].content = span_str("Tell me a long story about a lighthouse and a storm.");
    if (answerer_run(answerer, NULL, &request, &answer, &err) < 0)
        fail_msg("%s", err.message);
    printf("%d threads: %d prompt tokens in %lld ms (%d reused), %d answer tokens in %lld ms: %.1f tokens/s\n",
           t.site.threads, answer.prompt_tokens, (long long)answer.prompt_ms, answer.reused_tokens,
           answer.answer_tokens, (long long)answer.answer_ms, 1000.0 * answer.answer_tokens / (double)answer.answer_ms);
    answer_release(&answer);
    answerer_free(answerer);
    tiny_site_release(&t);
}

int main(void)
{
    char path[4096];
    const char *model = fixture_model_path(path, sizeof path);
    if (!model)
        return 77;
    const struct CMUnitTest tests[] = {cmocka_unit_test_prestate(test_question, (void *)path)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
