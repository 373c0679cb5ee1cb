/* Products, LoRA and attention for few rows against the scalar table. */
#include "tests/cuda/rows.h"

static const enum tensor_type types[] = {TENSOR_BF16, TENSOR_F32};

static const struct kernel_ops *reference(void)
{
    return kernels_cpu(KERNEL_SCALAR);
}

/* --- y = x·Wᵀ ---------------------------------------------------------------------------------------------------- */

/* Random blocks with sane scales; rows gap bytes further apart than they are long, the gaps hold NaN. */
static std::vector<uint8_t> random_matrix(enum tensor_type type, int32_t out, int32_t in, size_t gap)
{
    size_t row = 0, block = tensor_type_block_bytes(type);
    if (!tensor_type_row_bytes(type, (size_t)in, &row))
        abort();
    std::vector<uint8_t> data((row + gap) * (size_t)out, 0xff);
    for (int32_t o = 0; o < out; o++) {
        uint8_t *at = data.data() + (size_t)o * (row + gap);
        for (size_t i = 0; i < row; i++)
            at[i] = (uint8_t)support_bits();
        for (uint8_t *b = at; b < at + row; b += block) {
            if (type == TENSOR_F32) {
                float x = support_uniform();
                memcpy(b, &x, 4);
            } else if (type == TENSOR_F16 || type == TENSOR_BF16) {
                b[1] = (uint8_t)((b[1] & 0x83) | (type == TENSOR_F16 ? 0x30 : 0x3c));
            } else if (type == TENSOR_Q6_K) {
                b[208] = 0x10;
                b[209] = 0x0c;
            } else if (type == TENSOR_Q2_K) {
                b[81] = (uint8_t)(0x24 | (b[81] & 0x80));
                b[83] = 0x28;
            } else {
                b[1] = (uint8_t)(0x24 | (b[1] & 0x80));
                if (type == TENSOR_Q4_1 || type == TENSOR_Q5_1 || type == TENSOR_Q4_K || type == TENSOR_Q5_K)
                    b[3] = 0x28;
            }
        }
    }
    return data;
}

static void check_linear(enum tensor_type type, enum tensor_type w_type, int32_t m, int32_t out, int32_t in, size_t gap,
                         size_t skip)
{
    size_t row = 0;
    if (!tensor_type_row_bytes(w_type, (size_t)in, &row))
        abort();
    std::vector<uint8_t> w = random_matrix(w_type, out, in, gap), moved(skip, 0xff);
    moved.insert(moved.end(), w.begin(), w.end());
    device_vector<uint8_t> w_dev(moved);
    std::vector<float> values((size_t)out * (size_t)in), want((size_t)m * (size_t)out), scratch((size_t)in);
    for (int32_t o = 0; o < out; o++)
        tensor_dequantise(w_type, w.data() + (size_t)o * (row + gap), (size_t)in, &values[(size_t)o * (size_t)in]);
    for (float &v : values)
        v = host_round(v, type);
    std::vector<float> x = random_elements(type, (size_t)m * (size_t)in);
    struct kernel_run run = {};
    run.scratch = scratch.data();
    run.scratch_bytes = scratch.size() * sizeof(float);
    struct tensor dense = {values.data(), TENSOR_F32, out, in, NULL};
    struct served_linear part = {};
    part.w = &dense;
    part.y = want.data();
    reference()->linear_decode(&run, m, 1, &part, x.data());

    device_rows x_rows(type, m, in, in + 8, 0, x), y_rows(type, m, out, (out + 15) / 8 * 8);
    std::vector<float> poison(want.size() + 1, NAN);
    device_vector<float> y_float(poison);
    decode_linear((stream_t)0, type, m, out, in, w_type, w_dev.at + skip, row + gap, x_rows.rows(), y_rows.rows(),
                  NULL);
    CHECK_CLOSE(y_rows.get(), want, type == TENSOR_F32 ? 1e-5 : 4e-3);
    CHECK(y_rows.guarded());
    decode_linear((stream_t)0, type, m, out, in, w_type, w_dev.at + skip, row + gap, x_rows.rows(), {NULL, 0},
                  y_float.at);
    std::vector<float> got = y_float.get();
    CHECK(got.back() != got.back());
    got.pop_back();
    CHECK_CLOSE(got, want, 1e-5);
}

static void test_linear_types(void)
{
    const enum tensor_type w_types[] = {TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q5_0,
                                        TENSOR_Q5_1, TENSOR_Q8_0, TENSOR_Q2_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};
    for (enum tensor_type type : types) {
        for (enum tensor_type w_type : w_types) {
            int32_t block = (int32_t)tensor_type_block(w_type);
            for (int32_t in : {block == 1 ? 8 : block, block == 1 ? 200 : 9 * block}) {
                check_linear(type, w_type, 1, 37, in, 0, 0);
                check_linear(type, w_type, 5, 16, in, 16, 0);
            }
            check_linear(type, w_type, 8, 33, block == 1 ? 1160 : 5 * block, 0, 0);
        }
    }
}

/* A matrix that is not aligned to whole pieces, and rows that are not. */
static void test_linear_unaligned(void)
{
    for (enum tensor_type type : types) {
        check_linear(type, TENSOR_BF16, 3, 19, 136, 2, 0);
        check_linear(type, TENSOR_BF16, 3, 19, 136, 0, 2);
        check_linear(type, TENSOR_F16, 3, 19, 136, 2, 2);
        check_linear(type, TENSOR_F32, 3, 19, 136, 4, 4);
        check_linear(type, TENSOR_Q4_0, 2, 19, 96, 0, 2);
        check_linear(type, TENSOR_Q8_0, 2, 19, 96, 0, 2);
        check_linear(type, TENSOR_Q6_K, 2, 19, 256, 0, 2);
        check_linear(type, TENSOR_Q2_K, 2, 19, 256, 0, 4);
    }
}

/* A row's bits do not depend on the rows beside it. */
static void test_linear_independence(void)
{
    int32_t out = 21, in = 1056;
    std::vector<uint8_t> w = random_matrix(TENSOR_BF16, out, in, 0);
    device_vector<uint8_t> w_dev(w);
    for (enum tensor_type type : types) {
        std::vector<float> x = random_elements(type, 8 * (size_t)in);
        device_rows x_rows(type, 8, in, in, 0, x);
        device_vector<float> all(std::vector<float>(8 * (size_t)out)), one(std::vector<float>((size_t)out));
        decode_linear((stream_t)0, type, 8, out, in, TENSOR_BF16, w_dev.at, (size_t)in * 2, x_rows.rows(), {NULL, 0},
                      all.at);
        for (int32_t t = 0; t < 8; t++) {
            struct rows row = {static_cast<uint8_t *>(x_rows.rows().at) + (size_t)(t * in) * x_rows.size(), in};
            decode_linear((stream_t)0, type, 1, out, in, TENSOR_BF16, w_dev.at, (size_t)in * 2, row, {NULL, 0}, one.at);
            CHECK_SAME(one.get().data(), all.get().data() + t * out, (size_t)out);
        }
    }
}

static void test_linear_empty(void)
{
    decode_linear((stream_t)0, TENSOR_BF16, 0, 8, 8, TENSOR_BF16, NULL, 16, {NULL, 8}, {NULL, 8}, NULL);
    decode_linear((stream_t)0, TENSOR_BF16, 1, 0, 8, TENSOR_BF16, NULL, 16, {NULL, 8}, {NULL, 8}, NULL);
    support_sync();
}

/* --- LoRA -------------------------------------------------------------------------------------------------------- */

static void check_lora(enum tensor_type type, int32_t m, int32_t rank, int32_t in, int32_t out, size_t skip)
{
    int32_t h_stride = rank + 5;
    std::vector<float> a = random_floats(skip + (size_t)rank * (size_t)in),
                       b = random_floats((size_t)out * (size_t)rank);
    std::vector<float> x = random_elements(type, (size_t)m * (size_t)in),
                       y = random_elements(type, (size_t)m * (size_t)out);
    std::vector<float> h((size_t)m * (size_t)rank), got_h;
    device_vector<float> a_dev(a), b_dev(b), h_dev(std::vector<float>((size_t)m * (size_t)h_stride, NAN));
    device_rows x_rows(type, m, in, in + 16, 8, x), y_rows(type, m, out, (out + 7) / 8 * 8, 0, y);
    struct kernel_run none = {};
    reference()->lora_down(&none, m, in, rank, a.data() + skip, x.data(), h.data());
    decode_lora_down((stream_t)0, type, m, rank, in, a_dev.at + skip, x_rows.rows(), h_dev.at, h_stride);
    std::vector<float> padded = h_dev.get();
    bool kept = true;
    for (size_t i = 0; i < padded.size(); i++) {
        if (i % (size_t)h_stride < (size_t)rank)
            got_h.push_back(padded[i]);
        else
            kept = kept && padded[i] != padded[i];
    }
    CHECK(kept);
    CHECK_CLOSE(got_h, h, 1e-5);
    reference()->lora_up(&none, m, out, rank, 0.5f, b.data(), h.data(), rank, y.data());
    decode_lora_up((stream_t)0, type, m, out, rank, 0.5f, b_dev.at, h_dev.at, h_stride, y_rows.rows());
    CHECK_CLOSE(y_rows.get(), y, type == TENSOR_F32 ? 1e-5 : 4e-3);
    CHECK(y_rows.guarded());
}

static void test_lora(void)
{
    for (enum tensor_type type : types) {
        for (int32_t rank : {1, 3, 16, 48}) {
            check_lora(type, 1, rank, 72, 100, 0);
            check_lora(type, 3, rank, 1096, 33, 1);
            check_lora(type, 8, rank, 2048, 64, 0);
        }
        decode_lora_down((stream_t)0, type, 0, 4, 8, NULL, {NULL, 8}, NULL, 4);
        decode_lora_up((stream_t)0, type, 0, 8, 4, 1.0f, NULL, NULL, 4, {NULL, 8});
    }
    support_sync();
}

/* --- keys, values, attention ------------------------------------------------------------------------------------- */

/* Sequences whose blocks are strewn over one pool. */
struct cache {
    struct kv_layout layout;
    int32_t layer;
    size_t block_bytes;
    std::vector<int32_t> lengths;
    std::vector<std::vector<size_t>> blocks; /* of each sequence: numbers in the pool */
    std::vector<std::vector<float>> k, v;    /* as stored: (length, kv_heads·head_size) */
    device_vector<uint8_t> pool;
    std::vector<void *> table;
    std::vector<size_t> table_at;
    device_vector<void *> table_dev;

    static size_t blocks_of(const std::vector<int32_t> &lengths)
    {
        size_t n = 2;
        for (int32_t l : lengths)
            n += (size_t)((l + KV_BLOCK - 1) / KV_BLOCK);
        return n;
    }
    cache(const struct kv_layout &layout_, int32_t layer_, const std::vector<int32_t> &lengths_)
        : layout(layout_), layer(layer_), block_bytes(kv_block_bytes(&layout_)), lengths(lengths_),
          pool(std::vector<uint8_t>(blocks_of(lengths_) * kv_block_bytes(&layout_), 0xff)),
          table_dev(std::vector<void *>(blocks_of(lengths_)))
    {
        std::vector<size_t> free_blocks(blocks_of(lengths));
        for (size_t i = 0; i < free_blocks.size(); i++)
            free_blocks[i] = i;
        for (size_t i = free_blocks.size(); i > 1; i--)
            std::swap(free_blocks[i - 1], free_blocks[(size_t)support_below((int32_t)i)]);
        for (int32_t l : lengths) {
            std::vector<size_t> own;
            table_at.push_back(table.size());
            for (int32_t t = 0; t < l; t += KV_BLOCK) {
                own.push_back(free_blocks.back());
                table.push_back(pool.at + free_blocks.back() * block_bytes);
                free_blocks.pop_back();
            }
            blocks.push_back(own);
            k.push_back(random_elements(layout.type, (size_t)(l * layout.kv_heads * layout.head_size)));
            v.push_back(random_elements(layout.type, (size_t)(l * layout.kv_heads * layout.head_size)));
        }
        table.resize(table_dev.count);
        table_dev.set(table);
    }
    struct kv_row row(size_t sequence, int32_t position) const
    {
        struct kv_row r = {};
        r.blocks = table_dev.at + table_at[sequence];
        r.position = position;
        return r;
    }
    size_t width() const
    {
        return (size_t)(layout.kv_heads * layout.head_size);
    }
    /* Stores all tokens of all sequences, in one call each for a mix of rows, the last ones skipped. */
    void store()
    {
        std::vector<struct kv_row> rows;
        std::vector<float> keys, values;
        for (size_t i = 0; i < lengths.size(); i++) {
            keys.insert(keys.end(), k[i].begin(), k[i].end());
            values.insert(values.end(), v[i].begin(), v[i].end());
            for (int32_t t = 0; t < lengths[i]; t++)
                rows.push_back(row(i, t));
        }
        for (int i = 0; i < 2; i++) {
            struct kv_row skipped = {};
            skipped.position = -1;
            rows.push_back(skipped);
            keys.resize(keys.size() + width(), NAN);
            values.resize(values.size() + width(), NAN);
        }
        int32_t m = (int32_t)rows.size(), n = (int32_t)width();
        device_vector<struct kv_row> rows_dev(rows);
        device_rows k_rows(layout.type, m, n, n + 8, 0, keys), v_rows(layout.type, m, n, n + 16, 8, values);
        decode_store((stream_t)0, &layout, layer, m, rows_dev.at, k_rows.rows(), v_rows.rows());
        support_sync();
    }
    /* Checks every byte of the pool against what the layout says, and replaces k and v by what is stored. */
    void check()
    {
        size_t size = layout.quantised ? 1 : layout.type == TENSOR_F32 ? 4 : 2, heads = (size_t)layout.kv_heads;
        size_t d = (size_t)layout.head_size, part = KV_BLOCK * width() * size;
        std::vector<uint8_t> bytes = pool.get(), want(bytes.size(), 0xff);
        bool near = true;
        for (size_t i = 0; i < lengths.size(); i++) {
            for (size_t t = 0; t < (size_t)lengths[i]; t++) {
                size_t base = blocks[i][t / KV_BLOCK] * block_bytes + (size_t)layer * kv_layer_bytes(&layout);
                for (int which = 0; which < 2; which++) {
                    for (size_t h = 0; h < heads; h++) {
                        float *x = (which ? v : k)[i].data() + t * width() + h * d, top = 0, scale = 0;
                        for (size_t c = 0; c < d; c++)
                            top = fmaxf(top, fabsf(x[c]));
                        scale = top / 127.0f;
                        if (layout.quantised)
                            memcpy(&want[base + 2 * part +
                                         ((size_t)which * KV_BLOCK * heads + (t % KV_BLOCK) * heads + h) * 4],
                                   &scale, 4);
                        for (size_t c = 0; c < d; c++) {
                            uint8_t *to =
                                &want[base + (size_t)which * part + ((t % KV_BLOCK) * width() + h * d + c) * size];
                            int8_t q = (int8_t)lrintf(scale > 0 ? x[c] / scale : 0);
                            bf16 half = host_bf16(x[c]);
                            memcpy(to, layout.quantised ? (void *)&q : size == 4 ? (void *)&x[c] : (void *)&half, size);
                            if (layout.quantised) {
                                near = near && fabsf((float)q * scale - x[c]) <= 0.502f * scale;
                                x[c] = (float)q * scale;
                            }
                        }
                    }
                }
            }
        }
        CHECK(near);
        CHECK(bytes == want);
    }
};

/* Rows at the given places (sequence, position; position −1: skipped) against the reference. Returns o. */
struct place {
    size_t sequence;
    int32_t position;
};

static std::vector<float> attend(const cache &c, const struct attention_shape &shape, const std::vector<place> &places,
                                 const std::vector<float> &q, int32_t length_max)
{
    int32_t m = (int32_t)places.size(), n = shape.heads * shape.head_size;
    std::vector<struct kv_row> rows;
    for (const place &p : places)
        rows.push_back(c.row(p.sequence, p.position));
    device_vector<struct kv_row> rows_dev(rows);
    device_rows q_rows(c.layout.type, m, n, n + 8, 0, q), o_rows(c.layout.type, m, n, n + 24, 8);
    device_vector<uint8_t> work(std::vector<uint8_t>(decode_attention_work(&shape, m), 0xff));
    decode_attention((stream_t)0, &c.layout, &shape, c.layer, m, length_max, rows_dev.at, q_rows.rows(), o_rows.rows(),
                     work.at);
    CHECK(o_rows.guarded());
    return o_rows.get();
}

static void check_attention(const cache &c, const struct attention_shape &shape, const std::vector<place> &places)
{
    size_t n = (size_t)(shape.heads * shape.head_size);
    std::vector<float> q = random_elements(c.layout.type, places.size() * n), want(places.size() * n);
    int32_t length_max = 1;
    for (size_t i = 0; i < places.size(); i++) {
        const place &p = places[i];
        std::vector<float> scratch((size_t)(p.position + 1));
        struct kernel_run run = {};
        run.scratch = scratch.data();
        run.scratch_bytes = scratch.size() * sizeof(float);
        length_max = std::max(length_max, p.position + 1);
        if (p.position >= 0)
            reference()->attention_decode(&run, &shape, 1, p.position + 1, &q[i * n], c.k[p.sequence].data(),
                                          c.v[p.sequence].data(), (int32_t)c.width(), &want[i * n]);
    }
    std::vector<float> got = attend(c, shape, places, q, length_max);
    for (size_t i = 0; i < places.size() * n; i++) { /* a skipped row keeps what it held: the poison */
        if (places[i / n].position >= 0)
            continue;
        CHECK(got[i] != got[i]);
        got[i] = 0;
    }
    CHECK_CLOSE(got, want, c.layout.type == TENSOR_F32 ? 1e-5 : 4e-3);
    /* alone, and with room for more tokens: the same bits */
    for (size_t i = 0; i<places.size(); i += places.size()> 8 ? 29 : 3) {
        if (places[i].position < 0)
            continue;
        std::vector<float> one(q.begin() + (ptrdiff_t)(i * n), q.begin() + (ptrdiff_t)((i + 1) * n));
        std::vector<float> alone = attend(c, shape, {places[i]}, one, length_max + 1000);
        CHECK_SAME(alone.data(), got.data() + i * n, n);
    }
}

static struct attention_shape shape_of(int32_t heads, const struct kv_layout &layout, int32_t window)
{
    return {heads, layout.kv_heads, layout.head_size, window, 1.0f / sqrtf((float)layout.head_size) * 3};
}

static void test_attention_shapes(void)
{
    const struct {
        int32_t heads, kv_heads, head_size;
    } shapes[] = {{4, 4, 16}, {4, 2, 64}, {3, 1, 64}, {6, 2, 80}, {14, 2, 32}, {8, 1, 256}, {5, 1, 128}, {2, 1, 48}};
    for (enum tensor_type type : types) {
        for (bool quantised : {false, true}) {
            for (auto s : shapes) {
                struct kv_layout layout = {type, quantised, 3, s.kv_heads, s.head_size};
                cache c(layout, 1, {1, 33, 150, 64});
                c.store();
                c.check();
                check_attention(c, shape_of(s.heads, layout, 0),
                                {{0, 0}, {1, 32}, {0, -1}, {2, 149}, {3, 63}, {2, 31}});
            }
        }
    }
}

static void test_attention_window(void)
{
    for (enum tensor_type type : types) {
        struct kv_layout layout = {type, false, 1, 2, 32};
        cache c(layout, 0, {40, 330});
        c.store();
        c.check();
        for (int32_t window : {1, 33, 200, 330, 1000})
            check_attention(c, shape_of(4, layout, window), {{0, 39}, {1, 329}, {1, 200}, {1, 0}});
    }
}

/* More keys than PARTS_MAX parts of the smallest size hold. */
static void test_attention_long(void)
{
    struct kv_layout layout = {TENSOR_BF16, true, 1, 1, 32};
    cache c(layout, 0, {5000, 4097});
    c.store();
    c.check();
    check_attention(c, shape_of(2, layout, 0), {{0, 4999}, {1, 4096}, {1, 4095}, {0, 4400}});
}

/* Many rows of a sequence in one pass: one block does all parts of a row. */
static void test_attention_prefill(void)
{
    for (enum tensor_type type : types) {
        struct kv_layout layout = {type, type == TENSOR_BF16, 2, 2, 32};
        cache c(layout, 1, {300, 20});
        c.store();
        c.check();
        std::vector<place> places;
        for (int32_t t = 220; t < 300; t++)
            places.push_back({0, t});
        places.push_back({1, 19});
        places.push_back({1, -1});
        check_attention(c, shape_of(6, layout, 0), places);
        check_attention(c, shape_of(2, layout, 150), places);
    }
}

static void test_attention_empty(void)
{
    struct kv_layout layout = {TENSOR_BF16, false, 1, 1, 16};
    struct attention_shape shape = shape_of(1, layout, 0);
    CHECK(kv_layer_bytes(&layout) == 2048 && kv_block_bytes(&layout) == 2048);
    CHECK(decode_attention_work(&shape, 0) == 0);
    decode_store((stream_t)0, &layout, 0, 0, NULL, {NULL, 16}, {NULL, 16});
    decode_attention((stream_t)0, &layout, &shape, 0, 0, 10, NULL, {NULL, 16}, {NULL, 16}, NULL);
    support_sync();
    size_t most = 0;
    for (int32_t m = 1; m < 300; m++) { /* grows with m */
        size_t bytes = decode_attention_work(&shape, m);
        CHECK(bytes >= most);
        most = bytes;
    }
}

int main(void)
{
    RUN(test_linear_types);
    RUN(test_linear_unaligned);
    RUN(test_linear_independence);
    RUN(test_linear_empty);
    RUN(test_lora);
    RUN(test_attention_shapes);
    RUN(test_attention_window);
    RUN(test_attention_long);
    RUN(test_attention_prefill);
    RUN(test_attention_empty);
    return check_report();
}
