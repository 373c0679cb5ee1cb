/* GGUF: a small model loads; each kind of broken file is refused with the field's name; random damage never crashes. */
#include "tests/formats/fixtures.h"

enum { D = 32, HEADS = 2, FF = 64, VOCABULARY = 48 };

/* What to write wrongly. Zero: a good file of one layer. */
struct flaw {
    const char *drop;      /* leave this key or tensor out */
    const char *reshape;   /* give this tensor one row more */
    const char *poison;    /* put a NaN into this tensor's first scale or value */
    const char *extra;     /* add this tensor */
    const char *twice_key; /* add this u32 key once more */
    uint32_t alignment;    /* general.alignment; 0: none */
    uint32_t heads;        /* 0: HEADS */
    float eps;             /* 0: 1e-5 */
};

static bool same(const char *a, const char *b)
{
    return a && strcmp(a, b) == 0;
}

static uint8_t zeroes[VOCABULARY * D * 4 + 4096];
static uint8_t poisoned[VOCABULARY * D * 4 + 4096];

static void put_tensor(struct gguf_writer *w, const struct flaw *f, const char *name, enum tensor_type type,
                       uint64_t in, uint64_t out)
{
    size_t bytes = 0;
    if (same(f->drop, name))
        return;
    out += same(f->reshape, name);
    assert_true(tensor_type_row_bytes(type, in, &bytes));
    gguf_writer_tensor(w, name, type, out > 1 ? 2 : 1, (uint64_t[]){in, out},
                       span_of(same(f->poison, name) ? poisoned : zeroes, bytes * out));
}

static void put_u32(struct gguf_writer *w, const struct flaw *f, const char *key, uint32_t value)
{
    if (!same(f->drop, key))
        gguf_writer_u32(w, key, value);
    if (same(f->twice_key, key))
        gguf_writer_u32(w, key, value);
}

static void build(const struct flaw *f, struct buffer *out)
{
    struct gguf_writer w;
    gguf_writer_init(&w, 1 << 16);
    memset(poisoned, 0xff, 8); /* NaN as F32, F16 and BF16 */
    if (!same(f->drop, "general.architecture"))
        gguf_writer_string(&w, "general.architecture", span_str("llama"));
    if (f->alignment)
        gguf_writer_u32(&w, "general.alignment", f->alignment);
    put_u32(&w, f, "llama.block_count", 1);
    put_u32(&w, f, "llama.context_length", 64);
    put_u32(&w, f, "llama.embedding_length", D);
    put_u32(&w, f, "llama.feed_forward_length", FF);
    put_u32(&w, f, "llama.attention.head_count", f->heads ? f->heads : HEADS);
    put_u32(&w, f, "llama.attention.head_count_kv", 1);
    gguf_writer_f32(&w, "llama.attention.layer_norm_rms_epsilon", f->eps != 0 ? f->eps : 1e-5f);
    put_tensor(&w, f, "token_embd.weight", TENSOR_Q8_0, D, VOCABULARY);
    put_tensor(&w, f, "output_norm.weight", TENSOR_F32, D, 1);
    put_tensor(&w, f, "blk.0.attn_norm.weight", TENSOR_F32, D, 1);
    put_tensor(&w, f, "blk.0.ffn_norm.weight", TENSOR_F32, D, 1);
    put_tensor(&w, f, "blk.0.attn_q.weight", TENSOR_Q4_1, D, D);
    put_tensor(&w, f, "blk.0.attn_k.weight", TENSOR_Q4_0, D, D / HEADS);
    put_tensor(&w, f, "blk.0.attn_v.weight", TENSOR_F16, D, D / HEADS);
    put_tensor(&w, f, "blk.0.attn_output.weight", TENSOR_BF16, D, D);
    put_tensor(&w, f, "blk.0.ffn_gate.weight", TENSOR_F32, D, FF);
    put_tensor(&w, f, "blk.0.ffn_up.weight", TENSOR_Q4_1, D, FF);
    put_tensor(&w, f, "blk.0.ffn_down.weight", TENSOR_Q8_0, FF, D);
    if (f->extra)
        put_tensor(&w, f, f->extra, TENSOR_F32, D, 1);
    buffer_init(out, 1 << 20);
    assert_int_equal(gguf_writer_finish(&w, out, NULL), 0);
    gguf_writer_release(&w);
}

/* Opens and loads. The bytes are copied to a block of their exact size, so that the sanitizer sees a read past them. */
static int load(struct span bytes, struct error *err)
{
    uint8_t *exact = malloc(bytes.len ? bytes.len : 1);
    struct model *model = calloc(1, sizeof *model);
    struct gguf *gguf = NULL;
    memcpy(exact, bytes.ptr, bytes.len);
    int rc = gguf_parse(span_of(exact, bytes.len), "test.gguf", &gguf, err);
    if (rc == 0)
        rc = gguf_load_model(gguf, model, err);
    gguf_close(gguf);
    free(model);
    free(exact);
    return rc;
}

static void test_good_file_loads(void **state)
{
    struct buffer bytes;
    struct error err = {0};
    (void)state;
    build(&(struct flaw){0}, &bytes);
    if (load(buffer_span(&bytes), &err) < 0)
        fail_msg("%s", err.message);
    buffer_release(&bytes);
}

static void test_flaws_are_named(void **state)
{
    static const struct {
        struct flaw flaw;
        const char *expected;
    } cases[] = {
        {{.drop = "general.architecture"}, "general.architecture is missing"},
        {{.drop = "llama.block_count"}, "llama.block_count is missing"},
        {{.drop = "blk.0.attn_v.weight"}, "blk.0.attn_v.weight is missing"},
        {{.drop = "token_embd.weight"}, "token_embd.weight is missing"},
        {{.reshape = "blk.0.attn_k.weight"}, "attn_k"},
        {{.reshape = "blk.0.ffn_down.weight"}, "ffn_down"},
        {{.reshape = "blk.0.ffn_norm.weight"}, "ffn_norm"},
        {{.poison = "token_embd.weight"}, "token_embd.weight holds a scale"},
        {{.poison = "blk.0.attn_q.weight"}, "attn_q.weight holds a scale"},
        {{.poison = "blk.0.attn_k.weight"}, "attn_k.weight holds a scale"},
        {{.poison = "blk.0.attn_v.weight"}, "attn_v.weight holds a scale"},
        {{.poison = "blk.0.attn_output.weight"}, "attn_output.weight holds a scale"},
        {{.poison = "blk.0.ffn_gate.weight"}, "ffn_gate.weight holds a scale"},
        {{.poison = "output_norm.weight"}, "output_norm.weight holds a scale"},
        {{.extra = "blk.0.attn_q.bias"}, "1 tensors are not part"},
        {{.extra = "blk.0.attn_norm.weight"}, "blk.0.attn_norm.weight stands twice"},
        {{.twice_key = "llama.embedding_length"}, "llama.embedding_length stands twice"},
        {{.alignment = 48}, "general.alignment is 48"},
        {{.alignment = 1u << 30}, "general.alignment is 1073741824"},
        {{.alignment = 4096}, "multiple of the alignment"},
        {{.heads = 3}, "3 heads do not divide"},
        {{.heads = 32}, "head size"},
        {{.eps = -1}, "epsilon"},
        {{.eps = (float)__builtin_inf()}, "not a finite number"},
    };
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct buffer bytes;
        struct error err = {0};
        build(&cases[i].flaw, &bytes);
        fixture_refused(load(buffer_span(&bytes), &err), &err, ERR_INTEGRITY, "test.gguf", cases[i].expected, NULL);
        buffer_release(&bytes);
    }
}

/* Overwrites bytes of a good file at `offset` (from the place where `after` ends, if given) and expects a refusal. */
static void patched(const char *after, size_t offset, uint64_t value, size_t size, const char *expected)
{
    struct buffer bytes;
    struct error err = {0};
    build(&(struct flaw){0}, &bytes);
    if (after)
        offset += (size_t)((uint8_t *)memmem(bytes.data, bytes.len, after, strlen(after)) - bytes.data) + strlen(after);
    memcpy(bytes.data + offset, &value, size);
    fixture_refused(load(buffer_span(&bytes), &err), &err, ERR_INTEGRITY, expected, NULL);
    buffer_release(&bytes);
}

static void test_numbers_are_bounded(void **state)
{
    const char *q = "blk.0.attn_q.weight", *k = "blk.0.attn_k.weight";
    (void)state;
    patched(NULL, 0, 0x46554748, 4, "not a GGUF file");
    patched(NULL, 4, 2, 4, "version 2");
    patched(NULL, 8, UINT64_MAX, 8, "tensors; at most");
    patched(NULL, 8, 1000000, 8, "tensors; at most");
    patched(NULL, 16, UINT64_MAX / 2, 8, "metadata pairs");
    patched(NULL, 24, UINT64_MAX, 8, "a metadata key");
    patched(NULL, 24, 0, 8, "key is empty");
    patched("general.architecture", 0, 99, 4, "unknown type 99");
    patched("general.architecture", 4, UINT64_MAX - 3, 8, "general.architecture");
    patched("general.architecture", 0, GGUF_ARRAY, 4, "general.architecture");
    patched("llama.block_count", 0, GGUF_I32, 4, "has type i32, expected u32");
    patched("llama.block_count", 4, 0, 4, "llama.block_count is 0");
    patched("llama.block_count", 4, 100000, 4, "llama.block_count is 100000");
    patched("llama.context_length", 4, UINT32_MAX, 4, "llama.context_length");
    patched(q, 0, 5, 4, "5 dimensions");
    patched(q, 0, 0, 4, "0 dimensions");
    patched(q, 4, 31, 8, "dimension 0 is 31");
    patched(q, 4, 0, 8, "dimension 0 is 0");
    patched(q, 12, 0, 8, "dimension 1 is 0");
    patched(q, 4, UINT64_MAX - 31, 8, "attn_q");
    patched(q, 12, UINT64_MAX, 8, "attn_q");
    patched(q, 12, 1u << 20, 8, "pass the end");
    patched(q, 20, 99, 4, "element type 99");
    patched(q, 24, UINT64_MAX - 31, 8, "pass the end");
    patched(q, 24, 1, 8, "offset 1 is no multiple");
    patched(k, 24, 0, 8, "overlap");
}

static void test_every_truncation_is_refused(void **state)
{
    struct buffer bytes;
    struct error err = {0};
    (void)state;
    build(&(struct flaw){0}, &bytes);
    size_t data = bytes.len - 32; /* the last padding may be absent, and the last tensor ends before it */
    for (size_t len = 0; len < data; len += len < 2048 ? 1 : 61)
        assert_int_equal(load(span_of(bytes.data, len), &err), ERR_INTEGRITY);
    buffer_release(&bytes);
}

static void test_random_damage_never_crashes(void **state)
{
    uint64_t seed = 12345;
    (void)state;
    for (int round = 0; round < 3000; round++) {
        struct buffer bytes;
        struct error err = {0};
        build(&(struct flaw){0}, &bytes);
        for (int i = 0; i < 3; i++) {
            seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
            bytes.data[(seed >> 33) % 1400] ^= (uint8_t)(1u << (seed >> 29 & 7));
        }
        int rc = load(buffer_span(&bytes), &err);
        assert_true(rc == 0 || (rc == ERR_INTEGRITY && err.message[0]));
        buffer_release(&bytes);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good_file_loads),
        cmocka_unit_test(test_flaws_are_named),
        cmocka_unit_test(test_numbers_are_bounded),
        cmocka_unit_test(test_every_truncation_is_refused),
        cmocka_unit_test(test_random_damage_never_crashes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
