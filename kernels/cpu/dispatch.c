/* Choosing a table, and the names of tables. */
#include "kernels/cpu/internal.h"

#include <math.h>

static const char *const names[] = {"scalar", "avx2", "avx512", "avx512-vnni", "avx512-bf16"};

const char *kernel_isa_name(enum kernel_isa isa)
{
    return names[isa];
}

bool kernel_isa_parse(const char *name, enum kernel_isa *ret_isa)
{
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        if (strcmp(name, names[i]) == 0) {
            *ret_isa = (enum kernel_isa)i;
            return true;
        }
    }
    return false;
}

#if defined(__x86_64__)
#include <cpuid.h>

/* The compiler's own test does not know this bit before gcc 13: leaf 7, sub-leaf 1, eax bit 5. */
static bool has_avx512_bf16(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

const struct kernel_ops *kernels_cpu(enum kernel_isa at_most)
{
    /* These also check that the system saves the wide registers. F16C comes with every CPU that has AVX2 and FMA. */
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (at_most >= KERNEL_AVX512_BF16 && vnni && has_avx512_bf16())
        return &kernel_ops_avx512_bf16;
    if (at_most >= KERNEL_AVX512_VNNI && vnni)
        return &kernel_ops_avx512_vnni;
    if (at_most >= KERNEL_AVX512 && avx512)
        return &kernel_ops_avx512;
    if (at_most >= KERNEL_AVX2 && avx2)
        return &kernel_ops_avx2;
    return &kernel_ops_scalar;
}
#else
const struct kernel_ops *kernels_cpu(enum kernel_isa at_most)
{
    (void)at_most;
    return &kernel_ops_scalar;
}
#endif

void kernels_rope_table(int32_t positions, int32_t rotated, double base, double scale, const float *factors,
                        float *table)
{
    int32_t half = rotated / 2;
    for (int32_t i = 0; i < half; i++) {
        double frequency = pow(base, -2.0 * i / rotated) / scale;
        if (factors)
            frequency /= (double)factors[i];
        for (int32_t t = 0; t < positions; t++) {
            float *pair = table + (ptrdiff_t)t * rotated + 2 * i;
            pair[0] = (float)cos(t * frequency);
            pair[1] = (float)sin(t * frequency);
        }
    }
}
