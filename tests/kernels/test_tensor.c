/* Decoders against blocks written by hand from the format's description, against the ggml project's, and sizes. */
#include "tests/kernels/support.h"

/* 0x3800 is 0.5, 0xbc00 is −1, 0x3400 is 0.25 in binary16. */

static void test_small_blocks(void)
{
    float out[32];
    uint8_t q4_0[18] = {0x00, 0x38}, q4_1[20] = {0x00, 0x38, 0x00, 0xbc}, q8_0[34] = {0x00, 0x34};
    uint8_t q5_0[22] = {0x00, 0x38}, q5_1[24] = {0x00, 0x38, 0x00, 0xbc};
    q4_0[2] = q4_1[4] = q5_0[6] = q5_1[8] = 0xf3; /* value 0 = 3, value 16 = 15 */
    q4_0[17] = 0x08;                              /* value 15 = 8, value 31 = 0 */
    q5_0[2] = q5_1[4] = 0x01;                     /* fifth bit of value 0 */
    q5_0[5] = q5_1[7] = 0x80;                     /* and of value 31 */
    q8_0[2] = 0x80;
    q8_0[33] = 5;
    tensor_dequantise(TENSOR_Q4_0, q4_0, 32, out);
    CHECK(out[0] == -2.5f && out[16] == 3.5f && out[15] == 0 && out[31] == -4 && out[1] == -4);
    tensor_dequantise(TENSOR_Q4_1, q4_1, 32, out);
    CHECK(out[0] == 0.5f && out[16] == 6.5f && out[5] == -1);
    tensor_dequantise(TENSOR_Q8_0, q8_0, 32, out);
    CHECK(out[0] == -32 && out[31] == 1.25f && out[7] == 0);
    tensor_dequantise(TENSOR_Q5_0, q5_0, 32, out);
    CHECK(out[0] == 1.5f && out[16] == -0.5f && out[31] == 0 && out[1] == -8);
    tensor_dequantise(TENSOR_Q5_1, q5_1, 32, out);
    CHECK(out[0] == 8.5f && out[16] == 6.5f && out[31] == 7 && out[1] == -1);
}

static void test_super_blocks(void)
{
    float out[256];
    uint8_t q6[210] = {0}, q4[144] = {0x00, 0x38, 0x00, 0x34}, q5[176] = {0x00, 0x38, 0x00, 0x34};
    q6[0] = 0x4f;        /* low bits: value 0 = 15, value 64 = 4 */
    q6[128] = 0x93;      /* high bits: value 0 = 3, 32 = 0, 64 = 1, 96 = 2 */
    q6[64 + 33] = 0x20;  /* second half: value 33 + 64 = low 2 */
    q6[192] = 2;         /* scale of values 0–15 */
    q6[192 + 4] = 0xff;  /* −1: values 64–79 */
    q6[192 + 6] = 1;     /* values 96–111 */
    q6[192 + 8 + 6] = 3; /* second half, values 96–111 */
    q6[208] = 0x00;
    q6[209] = 0x38;
    tensor_dequantise(TENSOR_Q6_K, q6, 256, out);
    CHECK(out[0] == 31 && out[1] == -32 && out[32] == 0 && out[64] == 6 && out[96] == 0);
    CHECK(out[65] == 16 && out[97] == -16 && out[128 + 97] == -45);
    /* Sub-block 0: scale 3, minimum 2; sub-block 1: scale 5; sub-block 5: scale 0x21 from the packed high bits. */
    q4[4] = q5[4] = 3;
    q4[4 + 4] = q5[4 + 4] = 2;
    q4[4 + 1] = q5[4 + 1] = 5 | 0x80;
    q4[4 + 9] = q5[4 + 9] = 0x41; /* scale 5: low 1, minimum 5: low 4 */
    q4[16] = q5[48] = 0x27;       /* value 0 = 7, value 32 = 2 */
    q4[16 + 64] = q5[48 + 64] = 0x10;
    q5[16] = 0x21; /* fifth bits of value 0 and value 160 */
    tensor_dequantise(TENSOR_Q4_K, q4, 256, out);
    CHECK(out[0] == 10 && out[1] == -0.5f && out[32] == 5 && out[33] == 0);
    CHECK(out[160] == 15.5f && out[161] == -1);
    tensor_dequantise(TENSOR_Q5_K, q5, 256, out);
    CHECK(out[0] == 34 && out[1] == -0.5f && out[32] == 5);
    CHECK(out[160] == 0.5f * 33 * 17 - 1 && out[161] == -1);
}

static void test_two_bits(void)
{
    float out[256];
    uint8_t q2[84] = {0};
    q2[0] = 0x13;       /* values 0–15: scale 3, minimum 1 */
    q2[3] = 0x01;       /* values 48–63: scale 1 */
    q2[8 + 7] = 0xf2;   /* values 240–255: scale 2, minimum 15 */
    q2[16] = 0x0b;      /* value 0 = 3, value 32 = 2 */
    q2[16 + 31] = 0x08; /* value 63 = 2 */
    q2[16 + 63] = 0xc0; /* value 255 = 3 */
    q2[81] = 0x38;
    q2[83] = 0x34;
    tensor_dequantise(TENSOR_Q2_K, q2, 256, out);
    CHECK(out[0] == 4.25f && out[1] == -0.25f && out[16] == 0 && out[32] == 0 && out[63] == 1 && out[62] == 0);
    CHECK(out[255] == -0.75f && out[240] == -3.75f && out[239] == 0);
}

static uint32_t read_u32(FILE *in)
{
    uint32_t v = 0;
    CHECK(fread(&v, sizeof v, 1, in) == 1);
    return v;
}

/* Every type's blocks of tests/golden/make_blocks.py: the values of the ggml project's package, to the bit. */
static void test_golden_blocks(void)
{
    enum { VALUES = 1024 };
    static float want[VALUES], got[VALUES];
    static uint8_t bytes[VALUES * 4];
    struct kernel_run run = {0};
    char magic[4] = {0};
    FILE *in = fopen("tests/golden/blocks.golden", "rb");
    CHECK(in != NULL);
    if (!in)
        return;
    CHECK(fread(magic, sizeof magic, 1, in) == 1 && memcmp(magic, "CGB1", sizeof magic) == 0);
    uint32_t count = read_u32(in);
    CHECK(count == 12);
    for (uint32_t i = 0; i < count && check_failures == 0; i++) {
        uint32_t type = read_u32(in), values = read_u32(in), size = read_u32(in);
        int32_t id = 0;
        size_t row = 0;
        CHECK(tensor_type_known(type) && values == VALUES && size <= sizeof bytes);
        CHECK(tensor_type_row_bytes((enum tensor_type)type, VALUES, &row) && row == size);
        if (check_failures > 0 || fread(bytes, 1, size, in) != size || fread(want, sizeof want, 1, in) != 1)
            break;
        struct tensor w = {bytes, (enum tensor_type)type, 1, VALUES};
        tensor_dequantise(w.type, bytes, VALUES, got);
        CHECK_SAME(got, want, VALUES);
        FOR_EACH_TABLE(ops)
        {
            memset(got, 0xff, sizeof got);
            ops->embed(&run, 1, &w, &id, 1, got);
            CHECK_SAME(got, want, VALUES);
        }
        if (check_failures > 0)
            fprintf(stderr, "the type is %s\n", tensor_type_name(w.type));
    }
    CHECK(fgetc(in) == EOF);
    fclose(in);
}

static void test_halves(void)
{
    static const struct {
        uint16_t bits;
        float value;
    } halves[] = {{0x0000, 0},
                  {0x3c00, 1},
                  {0xc000, -2},
                  {0x7bff, 65504},
                  {0x0001, 0x1p-24f},
                  {0x0400, 0x1p-14f},
                  {0x83ff, -0x1.ff8p-15f},
                  {0x7c00, INFINITY}};
    for (size_t i = 0; i < ARRAY_LEN(halves); i++) {
        float out = 7;
        tensor_dequantise(TENSOR_F16, &halves[i].bits, 1, &out);
        CHECK(out == halves[i].value);
    }
    uint16_t nan = 0x7e01, minus = 0xbfc0;
    float out = 0;
    tensor_dequantise(TENSOR_F16, &nan, 1, &out);
    CHECK(out != out);
    tensor_dequantise(TENSOR_BF16, &minus, 1, &out);
    CHECK(out == -1.5f);
}

static void test_sizes(void)
{
    size_t bytes = 1;
    CHECK(tensor_type_row_bytes(TENSOR_Q4_1, 576, &bytes) && bytes == 360);
    CHECK(tensor_type_row_bytes(TENSOR_Q6_K, 1536, &bytes) && bytes == 1260);
    CHECK(!tensor_type_row_bytes(TENSOR_Q6_K, 576, &bytes) && bytes == 1260);
    CHECK(!tensor_type_row_bytes(TENSOR_F32, SIZE_MAX / 2, &bytes));
    CHECK(tensor_type_row_bytes(TENSOR_Q2_K, 1536, &bytes) && bytes == 504);
    CHECK(!tensor_type_known(4) && tensor_type_known(10) && tensor_type_known(30));
    CHECK(strcmp(tensor_type_name(TENSOR_BF16), "BF16") == 0);
}

/* The fast decoders give the plain one's bits: products by one-hot rows are exact. */
static void test_fast_decoders(void)
{
    static const enum tensor_type types[] = {TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0, TENSOR_Q4_1,
                                             TENSOR_Q5_0, TENSOR_Q5_1, TENSOR_Q8_0, TENSOR_Q2_K,
                                             TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};
    struct kernel_run run = {0};
    FOR_EACH_TABLE(ops)
    {
        for (size_t i = 0; i < ARRAY_LEN(types); i++) {
            struct tensor w = support_tensor(types[i], 3, 512);
            int32_t ids[] = {2, 1, 0};
            float y[3 * 512], want[512];
            size_t row = 0;
            CHECK(tensor_type_row_bytes(types[i], 512, &row));
            ops->embed(&run, 3, &w, ids, 1, y);
            for (int r = 0; r < 3; r++) {
                tensor_dequantise(types[i], (const uint8_t *)w.data + row * (size_t)(2 - r), 512, want);
                CHECK_SAME(y + r * 512, want, 512);
            }
            free((void *)(uintptr_t)w.data);
        }
    }
}

int tests_tensor(void)
{
    RUN(test_small_blocks);
    RUN(test_super_blocks);
    RUN(test_two_bits);
    RUN(test_golden_blocks);
    RUN(test_halves);
    RUN(test_sizes);
    RUN(test_fast_decoders);
    return check_report();
}
