/*
 * Internal to the shim: stacks to switch between, within one thread of the process.
 *
 * A fiber runs entry(ctx) when first switched to; entry never returns. The thread's own stack is a fiber too: one that
 * was only zeroed. x86-64 switches by hand; elsewhere ucontext does. AddressSanitizer and ThreadSanitizer are told.
 */
#ifndef KERNELS_CUDA_SHIM_FIBER_H
#define KERNELS_CUDA_SHIM_FIBER_H

#include <stddef.h>

#if defined(__x86_64__) && !defined(FIBER_UCONTEXT)
#define FIBER_BY_HAND 1
#else
#define FIBER_BY_HAND 0
#include <ucontext.h>
#endif

struct fiber {
    void *stack; /* lowest address; NULL: the thread's own */
    size_t stack_bytes;
    void (*entry)(void *ctx);
    void *ctx;
#if FIBER_BY_HAND
    void *stack_pointer;
#else
    ucontext_t context;
#endif
    void *sanitizer_stack;
    const void *sanitizer_bottom;
    size_t sanitizer_bytes;
    void *sanitizer_fiber;
};

void fiber_make(struct fiber *f, void *stack, size_t stack_bytes, void (*entry)(void *ctx), void *ctx);
void fiber_release(struct fiber *f);
void fiber_switch(struct fiber *from, struct fiber *to);

#endif
