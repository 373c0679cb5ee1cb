/* Decoding of every tensor type, bit for bit as the CPU's, and the LoRA parts of an augmented matrix. */
#include "tests/cuda/rows.h"
#include "kernels/cuda/blocks.h"

static const enum tensor_type all_types[] = {TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0,
                                             TENSOR_Q4_1, TENSOR_Q5_0, TENSOR_Q5_1, TENSOR_Q8_0,
                                             TENSOR_Q2_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};

/* Rows of random bytes, where NaN and infinity among the scales are possible but no others than the CPU's come of it.
 */
static std::vector<uint8_t> random_rows(int32_t rows, size_t row_bytes)
{
    std::vector<uint8_t> bytes((size_t)rows * row_bytes);
    for (uint8_t &b : bytes)
        b = (uint8_t)(support_bits() >> 32);
    return bytes;
}

static size_t bytes_of_row(enum tensor_type type, int32_t n)
{
    size_t bytes = 0;
    CHECK(tensor_type_row_bytes(type, (size_t)n, &bytes));
    return bytes;
}

/* What the CPU decodes, rounded to the element. */
static std::vector<float> expected(enum tensor_type type, enum tensor_type from, int32_t rows, int32_t n,
                                   const std::vector<uint8_t> &bytes, size_t row_bytes)
{
    std::vector<float> want((size_t)rows * (size_t)n);
    for (int32_t r = 0; r < rows; r++)
        tensor_dequantise(from, bytes.data() + (size_t)r * row_bytes, (size_t)n, want.data() + (size_t)r * (size_t)n);
    for (float &v : want)
        v = host_round(v, type);
    return want;
}

/* The same bits, but for which NaN. */
static bool same(const std::vector<float> &a, const std::vector<float> &b)
{
    for (size_t i = 0; i < b.size(); i++) {
        if (!(a[i] != a[i] && b[i] != b[i]) && memcmp(&a[i], &b[i], sizeof(float)) != 0) {
            fprintf(stderr, "value %zu is %g, expected %g\n", i, (double)a[i], (double)b[i]);
            return false;
        }
    }
    return a.size() == b.size();
}

static void check_matrix(enum tensor_type type, enum tensor_type from, int32_t rows, int32_t n, size_t gap,
                         int32_t stride, int32_t column)
{
    size_t row_bytes = bytes_of_row(from, n) + gap;
    std::vector<uint8_t> bytes = random_rows(rows, row_bytes);
    device_vector<uint8_t> matrix(bytes);
    device_rows out(type, rows, n, stride, column);
    dequantise_matrix((stream_t)0, type, rows, n, from, matrix.at, row_bytes, out.rows());
    CHECK(same(out.get(), expected(type, from, rows, n, bytes, row_bytes)) && out.guarded());
}

static void test_every_type(void)
{
    for (enum tensor_type type : {TENSOR_F32, TENSOR_BF16}) {
        for (enum tensor_type from : all_types) {
            int32_t block = (int32_t)tensor_type_block(from), n = block == 256 ? 768 : 96;
            check_matrix(type, from, 7, n, 0, n, 0);
            check_matrix(type, from, 5, n, 48, n + 24, 8); /* rows with gaps, columns of a wider matrix */
            check_matrix(type, from, 3, n, 0, n + 7, 3);   /* nothing aligned */
            check_matrix(type, from, 1, block == 1 ? 8 : block, 0, block == 1 ? 8 : block, 0);
        }
    }
}

static void test_odd_widths(void) /* of the types whose block is one value */
{
    for (enum tensor_type type : {TENSOR_F32, TENSOR_BF16}) {
        for (enum tensor_type from : {TENSOR_F32, TENSOR_F16, TENSOR_BF16}) {
            check_matrix(type, from, 5, 33, 0, 40, 0);
            check_matrix(type, from, 600, 1, 0, 3, 1);
            check_matrix(type, from, 3, 12, 0, 16, 0);
        }
    }
}

static void test_several_blocks(void)
{
    check_matrix(TENSOR_BF16, TENSOR_Q4_1, 65, 2048, 0, 2048 + 64, 64);
    check_matrix(TENSOR_BF16, TENSOR_Q6_K, 33, 2304, 0, 2304, 0);
    check_matrix(TENSOR_BF16, TENSOR_Q2_K, 33, 2304, 4, 2304, 0);
}

static void test_empty(void)
{
    device_rows out(TENSOR_BF16, 1, 32, 32);
    dequantise_matrix((stream_t)0, TENSOR_BF16, 0, 32, TENSOR_Q8_0, NULL, 34, out.rows());
    const struct lora_part empty[2] = {{NULL, out.rows(), 0, 32, 1}, {NULL, out.rows(), 1, 0, 1}};
    lora_place((stream_t)0, TENSOR_BF16, 2, empty);
    lora_place((stream_t)0, TENSOR_BF16, 0, NULL);
    std::vector<float> values = out.get();
    CHECK(std::all_of(values.begin(), values.end(), [](float v) { return v != v; }));
}

/* decode_run32 and its tail: what other kernels decode with. */
template <enum tensor_type TYPE>
TEMPLATE_KERNEL decode_runs(const uint8_t *RESTRICT row, int32_t n, float *RESTRICT out)
{
    float x[32];
    for (int32_t run = (int32_t)threadIdx.x; run * 32 < n; run += WARP) {
        decode_run32_tail<TYPE>(row, (size_t)run, (size_t)n, x);
        for (int i = 0; i < 32; i++)
            out[run * 32 + i] = x[i];
    }
}

static void test_runs(void)
{
    for (enum tensor_type from : all_types) {
        bool tail = tensor_type_block(from) == 1;
        int32_t n = tail ? 77 : 1280, padded = (n + 31) / 32 * 32;
        std::vector<uint8_t> bytes = random_rows(1, bytes_of_row(from, n));
        device_vector<uint8_t> row(bytes);
        device_rows out(TENSOR_F32, 1, padded, padded);
        float *to = static_cast<float *>(out.rows().at);
#define CALL(TYPE) LAUNCH(decode_runs<TYPE>, 1, WARP, 0, (stream_t)0, row.at, n, to)
        FOR_TENSOR_TYPE(from, CALL)
#undef CALL
        std::vector<float> want = expected(TENSOR_F32, from, 1, n, bytes, bytes.size());
        want.resize((size_t)padded, 0.0f);
        CHECK(same(out.get(), want) && out.guarded());
    }
}

static void test_lora_parts(void)
{
    for (enum tensor_type type : {TENSOR_F32, TENSOR_BF16}) {
        for (int32_t rank : {1, 8, 11, 16}) {
            const int32_t in = 72, out = 45;
            std::vector<float> a = random_floats((size_t)(rank * in)), b = random_floats((size_t)(out * rank));
            device_vector<float> a_dev(a), b_dev(b);
            device_rows a_to(type, rank, in, in + 16, 0), b_to(type, out, rank, in + 16, rank == 11 ? 3 : 0);
            std::vector<struct lora_part> parts(LORA_PARTS_MAX,
                                                lora_part{NULL, a_to.rows(), 0, 1, 1}); /* two launches */
            parts[LORA_PARTS_MAX - 1] = {a_dev.at, a_to.rows(), rank, in, 1};
            parts.push_back({b_dev.at, b_to.rows(), out, rank, 0.75f});
            lora_place((stream_t)0, type, (int32_t)parts.size(), parts.data());
            for (float &v : a)
                v = host_round(v, type);
            for (float &v : b)
                v = host_round(0.75f * v, type);
            CHECK(same(a_to.get(), a) && a_to.guarded());
            CHECK(same(b_to.get(), b) && b_to.guarded());
        }
    }
}

int main(void)
{
    RUN(test_every_type);
    RUN(test_odd_widths);
    RUN(test_several_blocks);
    RUN(test_empty);
    RUN(test_runs);
    RUN(test_lora_parts);
    return check_report();
}
