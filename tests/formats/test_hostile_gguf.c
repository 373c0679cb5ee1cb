/*
 * GGUF files made to hurt: the classes of the published weaknesses of other loaders (llama.cpp's unless said
 * otherwise; numbers as their short descriptions have it), each of which must end in an error that names the field.
 * Files are written here byte by byte.
 * g: test_gguf.c, which damages a good file. t: test_tokenizer.c.
 *
 * class                                       | known from                              | tests
 * n_tensors times a size wraps                | CVE-2024-21836, CVE-2026-27940          | test_counts
 * n_kv times a size wraps                     | CVE-2024-23605                          | test_counts
 * a text's length + 1 wraps, or is too long   | CVE-2024-23496                          | test_strings
 * an array's count times a size wraps         | CVE-2024-21825                          | test_arrays
 * arrays in arrays, as deep as the file       | gguf-py's RecursionError                | test_arrays
 * more dimensions than there is room for      | CVE-2024-21802                          | test_dimensions
 * the product of the dimensions wraps         | CVE-2026-33298                          | test_dimensions
 * offset + size, or the sum of sizes, wraps   | CVE-2025-53630                          | test_places
 * data beyond the file's end                  | CVE-2026-7482 (Ollama)                  | test_places
 * tensors that share bytes                    | -                                       | test_places
 * names or keys that stand twice              | -                                       | g: flaws
 * what was not read is used                   | CVE-2024-41130, CVE-2024-39720 (Ollama) | g: every_truncation
 * a dimension or a block of 0 divides         | GHSA-3p75-pq92-q28f, issue 8816         | test_dimensions, _types
 * an alignment of 0 divides, a huge one wraps | CVE-2025-0317 (Ollama), pull 24997      | test_alignments
 * a type's number outside the table           | CVE-2024-42477, pull 19856              | test_types, _arrays
 * an empty key or name trips an assertion     | issue 24884                             | test_strings
 * a value of another type than is read        | pull 26690, CVE-2024-8063 (Ollama)      | test_value_types
 * heads, layers or widths of 0, or too many   | issue 2247, CVE-2025-0315 (Ollama)      | test_hyper_parameters
 * shapes that the hyper-parameters deny       | CVE-2026-7482 (Ollama)                  | test_shapes
 * a token too long for an int                 | CVE-2025-49847                          | test_vocabularies
 * a vocabulary of another size                | pull 14145                              | test_vocabularies
 * token ids and merges out of range           | -                                       | test_vocabularies
 * more tokens of a text than an int holds     | CVE-2025-52566                          | t: limits
 * NaN and infinite scales, of each type       | -                                       | test_scales
 */
#include "tests/formats/fixtures.h"

enum { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 };

/* In a block of its exact size, so that the sanitizer sees a read past it. */
static int load(struct span bytes, struct error *err)
{
    uint8_t *exact = malloc(bytes.len ? bytes.len : 1);
    struct model *model = calloc(1, sizeof *model);
    struct tokenizer *tokenizer = NULL;
    struct gguf *gguf = NULL;
    memcpy(exact, bytes.ptr, bytes.len);
    int rc = gguf_parse(span_of(exact, bytes.len), "bad.gguf", &gguf, err);
    if (rc == 0)
        rc = gguf_load_model(gguf, model, err);
    if (rc == 0 && gguf_has(gguf, "tokenizer.ggml.model"))
        rc = tokenizer_new(gguf, &tokenizer, err);
    tokenizer_free(tokenizer);
    gguf_close(gguf);
    free(model);
    free(exact);
    return rc;
}

static void refuse(struct buffer *b, const char *expected)
{
    struct error err = {0};
    assert_true(buffer_ok(b));
    fixture_refused(load(buffer_span(b), &err), &err, ERR_INTEGRITY, "bad.gguf", expected, NULL);
    buffer_release(b);
}

static void begin(struct buffer *b, uint64_t tensors, uint64_t pairs)
{
    buffer_init(b, 4 << 20);
    buffer_append(b, "GGUF", 4);
    buffer_u32(b, GGUF_VERSION);
    buffer_u64(b, tensors);
    buffer_u64(b, pairs);
}

static void text(struct buffer *b, const char *s)
{
    buffer_u64(b, strlen(s));
    buffer_append(b, s, strlen(s));
}

static void zeroes(struct buffer *b, size_t n)
{
    memset(buffer_extend(b, n), 0, n);
}

static void test_counts(void **state)
{
    /* 2^64 over the sizes of what others allocate for each, and just more than is allowed or than the file can hold. */
    static const uint64_t counts[] = {UINT64_MAX,           UINT64_MAX / 2, UINT64_MAX / 8 + 1, UINT64_MAX / 80 + 1,
                                      UINT64_MAX / 368 + 1, 1ull << 32,     1ull << 31};
    struct buffer b;
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(counts); i++) {
        begin(&b, counts[i], 0);
        zeroes(&b, 4096);
        refuse(&b, "tensors; at most");
        begin(&b, 0, counts[i]);
        zeroes(&b, 4096);
        refuse(&b, "metadata pairs; at most");
    }
    begin(&b, GGUF_TENSORS_MAX + 1, 0);
    zeroes(&b, (size_t)(GGUF_TENSORS_MAX + 1) * 64);
    refuse(&b, "tensors; at most");
    begin(&b, 0, GGUF_PAIRS_MAX + 1);
    zeroes(&b, (size_t)(GGUF_PAIRS_MAX + 1) * 64);
    refuse(&b, "metadata pairs; at most");
    begin(&b, 4096 / 33 + 1, 0);
    zeroes(&b, 4096);
    refuse(&b, "tensors; at most");
    begin(&b, 0, 4096 / 14 + 1);
    zeroes(&b, 4096);
    refuse(&b, "metadata pairs; at most");
    begin(&b, 0, 0);
    b.data[4] = 0, b.data[7] = 3; /* big-endian */
    refuse(&b, "version 50331648");
}

static void test_strings(void **state)
{
    static const uint64_t lengths[] = {UINT64_MAX, UINT64_MAX - 1, UINT64_MAX / 2,
                                       1ull << 32, 4097,           GGUF_STRING_BYTES_MAX + 1};
    struct buffer b;
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(lengths); i++) {
        begin(&b, 0, 1); /* a key */
        buffer_u64(&b, lengths[i]);
        zeroes(&b, 4096);
        refuse(&b, "a metadata key at byte 24");
        begin(&b, 0, 1); /* a value */
        text(&b, "the.key");
        buffer_u32(&b, STRING);
        buffer_u64(&b, lengths[i]);
        zeroes(&b, 4096);
        refuse(&b, "the.key");
        begin(&b, 0, 1); /* the second text of a list */
        text(&b, "the.list");
        buffer_u32(&b, ARRAY);
        buffer_u32(&b, STRING);
        buffer_u64(&b, 2);
        text(&b, "one");
        buffer_u64(&b, lengths[i]);
        zeroes(&b, 4096);
        refuse(&b, "the.list");
        begin(&b, 1, 0); /* a tensor's name */
        buffer_u64(&b, lengths[i]);
        zeroes(&b, 4096);
        refuse(&b, "a tensor's name at byte 24");
    }
    begin(&b, 0, 1);
    zeroes(&b, 64);
    refuse(&b, "a metadata key is empty");
    begin(&b, 1, 0);
    zeroes(&b, 64);
    refuse(&b, "a tensor's name is empty");
    begin(&b, 0, 1);
    buffer_u64(&b, 3);
    buffer_append(&b, "a\0b", 3);
    zeroes(&b, 64);
    refuse(&b, "NUL");
}

static void refuse_array(uint32_t type, uint64_t count, size_t bytes)
{
    struct buffer b;
    begin(&b, 0, 1);
    text(&b, "the.list");
    buffer_u32(&b, ARRAY);
    buffer_u32(&b, type);
    buffer_u64(&b, count);
    zeroes(&b, bytes);
    refuse(&b, "key the.list");
}

static void test_arrays(void **state)
{
    static const size_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};
    struct buffer b;
    (void)state;
    for (uint32_t type = 0; type < ARRAY_LEN(sizes); type++) {
        if (type == ARRAY)
            continue;
        refuse_array(type, UINT64_MAX, 256);
        if (sizes[type] > 1) /* count · size is 0 modulo 2^64 */
            refuse_array(type, UINT64_MAX / sizes[type] + 1, 256);
        refuse_array(type, UINT64_MAX / 16 + 2, 256); /* and 16 of a text's {length, pointer} */
        refuse_array(type, 256 / sizes[type] + 1, 256);
    }
    refuse_array(U8, GGUF_ARRAY_MAX + 1, 256);
    refuse_array(ARRAY, 1, 256);
    refuse_array(F64 + 1, 1, 256);
    refuse_array(UINT32_MAX, 1, 256);
    refuse_array(1u << 31, 1, 256);
    begin(&b, 0, 1); /* lists in lists, as deep as the file goes */
    text(&b, "the.list");
    buffer_u32(&b, ARRAY);
    for (int i = 0; i < 10000; i++) {
        buffer_u32(&b, ARRAY);
        buffer_u64(&b, 1);
    }
    refuse(&b, "key the.list is an array of type 9 (array)");
}

static void test_types(void **state)
{
    static const uint32_t values[] = {13, 255, 1u << 31, UINT32_MAX};
    static const uint32_t elements[] = {4,  5,  9,  11, 15,       16,        24,
                                        29, 31, 36, 40, 1u << 31, UINT32_MAX}; /* 4 and 5 are retired */
    struct buffer b;
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(values); i++) {
        begin(&b, 0, 1);
        text(&b, "the.key");
        buffer_u32(&b, values[i]);
        zeroes(&b, 64);
        refuse(&b, "key the.key has the unknown type");
    }
    for (size_t i = 0; i < ARRAY_LEN(elements); i++) {
        begin(&b, 1, 0);
        text(&b, "the.tensor");
        buffer_u32(&b, 1);
        buffer_u64(&b, 256);
        buffer_u32(&b, elements[i]);
        zeroes(&b, 4096);
        refuse(&b, "tensor the.tensor has element type");
    }
    begin(&b, 0, 1);
    text(&b, "the.key");
    buffer_u32(&b, BOOL);
    buffer_u8(&b, 2);
    refuse(&b, "key the.key is a bool of value 2");
}

/* One tensor of the given table row, and 4096 bytes of data. */
static void refuse_tensor(uint32_t dim_count, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint32_t type,
                          uint64_t offset, const char *expected)
{
    const uint64_t dims[] = {a, b, c, d};
    struct buffer out;
    begin(&out, 1, 0);
    text(&out, "the.tensor");
    buffer_u32(&out, dim_count);
    for (uint32_t i = 0; i < (dim_count < 4 ? dim_count : 4); i++)
        buffer_u64(&out, dims[i]);
    buffer_u32(&out, type);
    buffer_u64(&out, offset);
    zeroes(&out, (32 - out.len % 32) % 32 + 4096);
    refuse(&out, expected);
}

static void test_dimensions(void **state)
{
    const uint64_t big = 1ull << 32, top = UINT64_MAX;
    (void)state;
    refuse_tensor(0, 1, 1, 1, 1, TENSOR_F32, 0, "tensor the.tensor has 0 dimensions");
    refuse_tensor(5, 1, 1, 1, 1, TENSOR_F32, 0, "tensor the.tensor has 5 dimensions");
    refuse_tensor(UINT32_MAX, 1, 1, 1, 1, TENSOR_F32, 0, "tensor the.tensor has 4294967295 dimensions");
    refuse_tensor(4, 0, 1, 1, 1, TENSOR_F32, 0, "dimension 0 is 0");
    refuse_tensor(4, 1, 0, 1, 1, TENSOR_F32, 0, "dimension 1 is 0");
    refuse_tensor(4, 1, 1, 0, 1, TENSOR_F32, 0, "dimension 2 is 0");
    refuse_tensor(4, 1, 1, 1, 0, TENSOR_F32, 0, "dimension 3 is 0");
    refuse_tensor(1, 31, 1, 1, 1, TENSOR_Q4_0, 0, "dimension 0 is 31, expected a multiple of 32");
    refuse_tensor(1, 128, 1, 1, 1, TENSOR_Q2_K, 0, "dimension 0 is 128, expected a multiple of 256");
    /* Products of 2^64 and just more, in bytes and in values, with every dimension as the one too many. */
    refuse_tensor(1, top / 4 + 1, 1, 1, 1, TENSOR_F32, 0, "dimension 0");
    refuse_tensor(2, big, big, 1, 1, TENSOR_F32, 0, "dimension 1");
    refuse_tensor(2, big, big / 4, 1, 1, TENSOR_F32, 0, "dimension 1");
    refuse_tensor(3, 1u << 20, 1u << 20, 1u << 24, 1, TENSOR_F32, 0, "dimension 2");
    refuse_tensor(4, 1u << 20, 1u << 20, 1, 1u << 24, TENSOR_F16, 0, "dimension 3");
    refuse_tensor(4, 32, top / 18 + 1, 1, 1, TENSOR_Q4_0, 0, "dimension 1");
    refuse_tensor(2, 1ull << 63, 2, 1, 1, TENSOR_F32, 0, "dimension 0");
    refuse_tensor(2, 256, 1ull << 60, 1, 1, TENSOR_Q6_K, 0, "dimension 1");
}

static void test_places(void **state)
{
    struct buffer b;
    (void)state;
    refuse_tensor(1, 1025, 1, 1, 1, TENSOR_F32, 0, "tensor the.tensor: offset 0 and 4100 bytes pass the end");
    refuse_tensor(1, 1024, 1, 1, 1, TENSOR_F32, 32, "pass the end");
    refuse_tensor(1, 16, 1, 1, 1, TENSOR_F32, 4096, "pass the end");
    refuse_tensor(1, 16, 1, 1, 1, TENSOR_F32, UINT64_MAX - 31, "pass the end"); /* offset + size is 32 */
    refuse_tensor(1, 16, 1, 1, 1, TENSOR_F32, 1ull << 63, "pass the end");
    refuse_tensor(2, 1u << 31, 1u << 30, 1, 1, TENSOR_F32, 0, "pass the end"); /* 2^63 bytes */
    refuse_tensor(1, 16, 1, 1, 1, TENSOR_F32, 4, "offset 4 is no multiple of the alignment 32");
    for (uint64_t second = 0; second <= 64; second += 32) { /* the first has 128 bytes */
        begin(&b, 2, 0);
        for (int i = 0; i < 2; i++) {
            text(&b, i ? "tensor.b" : "tensor.a");
            buffer_u32(&b, 1);
            buffer_u64(&b, i ? 8 : 32);
            buffer_u32(&b, TENSOR_F32);
            buffer_u64(&b, i ? second : 0);
        }
        zeroes(&b, 4096);
        refuse(&b, "tensor.b overlap");
    }
}

static void test_alignments(void **state)
{
    static const uint32_t wrong[] = {0, 3, 48, 33, GGUF_ALIGNMENT_MAX * 2, 1u << 31, UINT32_MAX};
    static const uint32_t types[] = {U8, I32, U64, F32, BOOL, STRING};
    struct buffer b;
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(wrong) + ARRAY_LEN(types); i++) {
        begin(&b, 0, 1);
        text(&b, "general.alignment");
        buffer_u32(&b, i < ARRAY_LEN(wrong) ? U32 : types[i - ARRAY_LEN(wrong)]);
        buffer_u32(&b, i < ARRAY_LEN(wrong) ? wrong[i] : 0);
        buffer_u32(&b, 0);
        refuse(&b, "general.alignment");
    }
}

/* --- a model with one thing changed ------------------------------------------------------------------------------ */

enum { D = 32, FF = 64, VOCABULARY = 4 };

struct change {
    const char *key; /* of this u32 .. */
    uint32_t type;   /* .. the type, U32 to keep it, and .. */
    uint32_t value;  /* .. the value */
    const char *tensor;
    uint64_t in, out; /* of this tensor */
    bool vocabulary;  /* with a tokenizer: */
    size_t token_count, type_count, long_token;
    bool byte_types; /* token_type as a list of u8 */
    const char *merge;
};

static void put_number(struct gguf_writer *w, const struct change *c, const char *key, uint32_t value)
{
    const bool here = c->key && strcmp(c->key, key) == 0;
    const size_t at = w->pairs.len;
    gguf_writer_u32(w, key, here ? c->value : value);
    if (here && w->pairs.data) /* behind the key's length and bytes */
        w->pairs.data[at + 8 + strlen(key)] = (uint8_t)c->type;
}

static void put_matrix(struct gguf_writer *w, const struct change *c, const char *name, uint64_t in, uint64_t out)
{
    static float data[1 << 14];
    const bool here = c->tensor && strcmp(c->tensor, name) == 0;
    in = here ? c->in : in;
    out = here ? c->out : out;
    assert_true(in * out * 4 <= sizeof data);
    for (size_t i = 0; i < ARRAY_LEN(data); i++)
        data[i] = 1;
    gguf_writer_tensor(w, name, TENSOR_F32, out > 1 ? 2 : 1, (uint64_t[]){in, out}, span_of(data, in * out * 4));
}

static void put_vocabulary(struct gguf_writer *w, const struct change *c)
{
    static const char *const texts[4] = {"<|im_end|>", "a", "b", "ab"};
    static char bs[2 * TOKENIZER_TOKEN_BYTES_MAX];
    static const int32_t types[8] = {3, 1, 1, 1, 1, 1, 1, 1};
    struct span tokens[8], merge = span_str(c->merge ? c->merge : "a b");
    const size_t at = w->pairs.len;
    for (size_t i = 0; i < 8; i++)
        tokens[i] = span_str(texts[i % 4]);
    memset(bs, 'b', sizeof bs);
    if (c->long_token)
        tokens[2] = span_of(bs, c->long_token);
    gguf_writer_string(w, "tokenizer.ggml.model", span_str("gpt2"));
    gguf_writer_string(w, "tokenizer.ggml.pre", span_str("smollm"));
    gguf_writer_strings(w, "tokenizer.ggml.tokens", tokens, c->token_count ? c->token_count : VOCABULARY);
    gguf_writer_i32s(w, "tokenizer.ggml.token_type", types, c->type_count ? c->type_count : VOCABULARY);
    if (c->byte_types) {
        uint8_t *key = memmem(w->pairs.data + at, w->pairs.len - at, "token_type", 10);
        key[10 + 4] = U8;
        key[10 + 8] = 16; /* the same bytes, so that the file is whole */
    }
    gguf_writer_strings(w, "tokenizer.ggml.merges", &merge, 1);
    put_number(w, c, "tokenizer.ggml.bos_token_id", 0);
    put_number(w, c, "tokenizer.ggml.eos_token_id", 0);
    put_number(w, c, "tokenizer.ggml.padding_token_id", 0);
    put_number(w, c, "tokenizer.ggml.eot_token_id", 0);
}

static const char *const numbers[] = {"llama.block_count",          "llama.context_length",
                                      "llama.embedding_length",     "llama.feed_forward_length",
                                      "llama.attention.head_count", "llama.attention.head_count_kv",
                                      "llama.attention.key_length", "llama.attention.value_length",
                                      "llama.rope.dimension_count", "llama.vocab_size"};

static const struct {
    const char *name;
    uint64_t in, out;
} matrices[] = {
    {"token_embd.weight", D, VOCABULARY}, {"output_norm.weight", D, 1},     {"output.weight", D, VOCABULARY},
    {"rope_freqs.weight", 8, 1},          {"blk.0.attn_norm.weight", D, 1}, {"blk.0.ffn_norm.weight", D, 1},
    {"blk.0.attn_q.weight", D, D},        {"blk.0.attn_k.weight", D, 16},   {"blk.0.attn_v.weight", D, 16},
    {"blk.0.attn_output.weight", D, D},   {"blk.0.ffn_gate.weight", D, FF}, {"blk.0.ffn_up.weight", D, FF},
    {"blk.0.ffn_down.weight", FF, D},
};

static void build(const struct change *c, struct buffer *out)
{
    static const uint32_t values[] = {1, 64, D, FF, 2, 1, 16, 16, 16, VOCABULARY};
    struct gguf_writer w;
    gguf_writer_init(&w, 1 << 16);
    gguf_writer_string(&w, "general.architecture", span_str("llama"));
    for (size_t i = 0; i < ARRAY_LEN(numbers); i++)
        put_number(&w, c, numbers[i], values[i]);
    gguf_writer_f32(&w, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    if (c->vocabulary)
        put_vocabulary(&w, c);
    for (size_t i = 0; i < ARRAY_LEN(matrices); i++)
        put_matrix(&w, c, matrices[i].name, matrices[i].in, matrices[i].out);
    buffer_init(out, 1 << 20);
    assert_int_equal(gguf_writer_finish(&w, out, NULL), 0);
    gguf_writer_release(&w);
}

static void refuse_change(struct change c, const char *expected)
{
    struct buffer b;
    build(&c, &b);
    refuse(&b, expected);
}

static void test_unchanged_loads(void **state)
{
    (void)state;
    for (int vocabulary = 0; vocabulary < 2; vocabulary++) {
        struct buffer b;
        struct error err = {0};
        build(&(struct change){.vocabulary = vocabulary}, &b);
        if (load(buffer_span(&b), &err) < 0)
            fail_msg("%s", err.message);
        buffer_release(&b);
    }
}

static void test_value_types(void **state)
{
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(numbers); i++) {
        refuse_change((struct change){.key = numbers[i], .type = I32, .value = 16}, numbers[i]);
        refuse_change((struct change){.key = numbers[i], .type = F32, .value = 16}, numbers[i]);
    }
    refuse_change((struct change){.vocabulary = true, .byte_types = true},
                  "token_type is an array of u8, expected i32");
}

static void test_hyper_parameters(void **state)
{
    static const uint32_t wrong[] = {0, 1u << 31, UINT32_MAX, (1 << 20) + 1};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(numbers); i++)
        for (size_t j = 0; j < ARRAY_LEN(wrong); j++)
            refuse_change((struct change){.key = numbers[i], .type = U32, .value = wrong[j]}, numbers[i]);
    refuse_change((struct change){.key = numbers[0], .type = U32, .value = MODEL_LAYERS_MAX + 1}, numbers[0]);
    refuse_change((struct change){.key = numbers[0], .type = U32, .value = 2}, "blk.1.attn_norm.weight is missing");
    refuse_change((struct change){.key = numbers[2], .type = U32, .value = MODEL_WIDTH_MAX + 1}, numbers[2]);
    refuse_change((struct change){.key = numbers[6], .type = U32, .value = MODEL_HEAD_SIZE_MAX + 1}, numbers[6]);
    refuse_change((struct change){.key = numbers[5], .type = U32, .value = 3}, "key/value heads is 3");
    refuse_change((struct change){.key = numbers[9], .type = U32, .value = 5}, "vocab_size is 5");
}

/* Each tensor one row, one column or one block more or less, and on its side. */
static void test_shapes(void **state)
{
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(matrices); i++) {
        const uint64_t in = matrices[i].in, out = matrices[i].out;
        const bool embedding = i == 0; /* its rows are the vocabulary, which the file's other numbers must agree with */
        char name[32] = "";            /* without blk.0. and .weight */
        const char *from = strrchr(matrices[i].name, '.'), *to = matrices[i].name;
        to = strncmp(to, "blk.0.", 6) == 0 ? to + 6 : to;
        snprintf(name, sizeof name, "%.*s", (int)(from - to), to);
        for (int delta = -1; delta <= 1; delta += 2) {
            refuse_change((struct change){.tensor = matrices[i].name, .in = in + (uint64_t)(int64_t)delta, .out = out},
                          name);
            if (out > 1)
                refuse_change(
                    (struct change){.tensor = matrices[i].name, .in = in, .out = out + (uint64_t)(int64_t)delta},
                    embedding ? "vocab_size" : name);
        }
        if (in != out && !embedding)
            refuse_change((struct change){.tensor = matrices[i].name, .in = out, .out = in}, name);
    }
}

static void test_vocabularies(void **state)
{
    static const char *const ids[] = {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                                      "tokenizer.ggml.padding_token_id", "tokenizer.ggml.eot_token_id"};
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(ids); i++) {
        refuse_change((struct change){.vocabulary = true, .key = ids[i], .type = U32, .value = VOCABULARY}, ids[i]);
        refuse_change((struct change){.vocabulary = true, .key = ids[i], .type = U32, .value = UINT32_MAX}, ids[i]);
        refuse_change((struct change){.vocabulary = true, .key = ids[i], .type = I32, .value = 0}, ids[i]);
    }
    refuse_change((struct change){.vocabulary = true, .token_count = 3}, "tokenizer.ggml.tokens has 3 tokens");
    refuse_change((struct change){.vocabulary = true, .token_count = 8}, "tokenizer.ggml.tokens has 8 tokens");
    refuse_change((struct change){.vocabulary = true, .type_count = 3}, "tokenizer.ggml.token_type has 3 elements");
    refuse_change((struct change){.vocabulary = true, .type_count = 8}, "tokenizer.ggml.token_type has 8 elements");
    refuse_change((struct change){.vocabulary = true, .long_token = TOKENIZER_TOKEN_BYTES_MAX + 1},
                  "token 2 has 1025 bytes");
    refuse_change((struct change){.vocabulary = true, .merge = "a zz"}, "the right side of merge 0");
}

/* --- scales ------------------------------------------------------------------------------------------------------ */

/* A file that gets as far as its embedding, two rows of 512 values, which the loader looks at first. */
static void load_embedding(enum tensor_type type, size_t at, uint32_t bits, size_t width, const char *expected)
{
    struct gguf_writer w;
    struct buffer b;
    size_t row = 0;
    uint8_t data[2 * 512 * 4] = {0};
    assert_true(tensor_type_row_bytes(type, 512, &row));
    memcpy(data + at, &bits, width);
    gguf_writer_init(&w, 1 << 16);
    gguf_writer_string(&w, "general.architecture", span_str("llama"));
    gguf_writer_u32(&w, "llama.block_count", 1);
    gguf_writer_u32(&w, "llama.context_length", 64);
    gguf_writer_u32(&w, "llama.embedding_length", 512);
    gguf_writer_u32(&w, "llama.feed_forward_length", 64);
    gguf_writer_u32(&w, "llama.attention.head_count", 8);
    gguf_writer_f32(&w, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    gguf_writer_tensor(&w, "token_embd.weight", type, 2, (uint64_t[]){512, 2}, span_of(data, 2 * row));
    buffer_init(&b, 1 << 20);
    assert_int_equal(gguf_writer_finish(&w, &b, NULL), 0);
    gguf_writer_release(&w);
    refuse(&b, expected);
}

static void test_scales(void **state)
{
    static const struct {
        enum tensor_type type;
        size_t width; /* of the field, bytes */
        uint32_t bad[3], good;
        int count;
        size_t at[2]; /* in the block */
    } types[] = {
        {TENSOR_F32, 4, {0x7f800000, 0xff800000, 0x7fc00001}, 0x7f7fffff, 1, {0}},
        {TENSOR_BF16, 2, {0x7f80, 0xff80, 0x7fc1}, 0x7f7f, 1, {0}},
        {TENSOR_F16, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 1, {0}},
        {TENSOR_Q4_0, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 1, {0}},
        {TENSOR_Q4_1, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 2, {0, 2}},
        {TENSOR_Q5_0, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 1, {0}},
        {TENSOR_Q5_1, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 2, {0, 2}},
        {TENSOR_Q8_0, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 1, {0}},
        {TENSOR_Q2_K, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 2, {80, 82}},
        {TENSOR_Q4_K, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 2, {0, 2}},
        {TENSOR_Q5_K, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 2, {0, 2}},
        {TENSOR_Q6_K, 2, {0x7c00, 0xfc00, 0x7e01}, 0x7bff, 1, {208}},
    };
    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(types); i++) {
        size_t row = 0, block = tensor_type_block_bytes(types[i].type);
        assert_true(tensor_type_row_bytes(types[i].type, 512, &row));
        for (int j = 0; j < types[i].count; j++) {
            const size_t first = types[i].at[j], last = 2 * row - block + first;
            for (size_t k = 0; k < ARRAY_LEN(types[i].bad); k++) {
                const uint32_t bad = types[i].bad[k];
                load_embedding(types[i].type, first, bad, types[i].width, "token_embd.weight holds a scale or value");
                load_embedding(types[i].type, last, bad, types[i].width, "token_embd.weight holds a scale or value");
            }
            load_embedding(types[i].type, last, types[i].good, types[i].width, "output_norm.weight is missing");
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_counts),      cmocka_unit_test(test_strings),
        cmocka_unit_test(test_arrays),      cmocka_unit_test(test_types),
        cmocka_unit_test(test_dimensions),  cmocka_unit_test(test_places),
        cmocka_unit_test(test_alignments),  cmocka_unit_test(test_unchanged_loads),
        cmocka_unit_test(test_value_types), cmocka_unit_test(test_hyper_parameters),
        cmocka_unit_test(test_shapes),      cmocka_unit_test(test_vocabularies),
        cmocka_unit_test(test_scales),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
