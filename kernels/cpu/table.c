#include "kernels/cpu/simd.h"

#if defined(__AVX512BF16__)
#define NAME "avx512-bf16"
#define LEVEL KERNEL_AVX512_BF16
#elif defined(__AVX512VNNI__)
#define NAME "avx512-vnni"
#define LEVEL KERNEL_AVX512_VNNI
#elif defined(__AVX512F__)
#define NAME "avx512"
#define LEVEL KERNEL_AVX512
#else
#define NAME "avx2"
#define LEVEL KERNEL_AVX2
#endif

const struct kernel_ops ISA(kernel_ops) = {
    .name = NAME,
    .isa = LEVEL,
    .linear_forward = ISA(linear_forward),
    .linear_backward = ISA(linear_backward),
    .linear_decode = ISA(linear_decode),
    .interleaved_bytes = ISA(interleaved_bytes),
    .interleave = ISA(interleave),
    .lora_down = ISA(lora_down),
    .lora_up = ISA(lora_up),
    .lora_up_backward = ISA(lora_up_backward),
    .lora_down_backward = ISA(lora_down_backward),
    .lora_grad_b = ISA(lora_grad_b),
    .lora_grad_a = ISA(lora_grad_a),
    .rmsnorm_forward = ISA(rmsnorm_forward),
    .rmsnorm_backward = ISA(rmsnorm_backward),
    .rope = ISA(rope),
    .gated_forward = ISA(gated_forward),
    .gated_backward = ISA(gated_backward),
    .embed = ISA(embed),
    .add = ISA(add),
    .attention_forward = ISA(attention_forward),
    .attention_backward = ISA(attention_backward),
    .attention_decode = ISA(attention_decode),
    .cross_entropy = ISA(cross_entropy),
    .clip_accumulate = clip_accumulate,
    .adamw = ISA(adamw),
    .sgd_momentum = ISA(sgd_momentum),
};
