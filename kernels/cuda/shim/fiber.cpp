/* Fibers, the order in which they run, and what barriers and collectives mean: shim.h. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/shim/fiber.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__has_feature)
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#define SHIM_ASAN 1
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
#define SHIM_TSAN 1
#include <sanitizer/tsan_interface.h>
#endif

/* --- fibers ------------------------------------------------------------------------------------------------------ */

static void fiber_arrived(struct fiber *self, struct fiber *from)
{
#if defined(SHIM_ASAN)
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(self->sanitizer_stack, &bottom, &bytes);
    if (!from->stack) { /* where the thread's own stack is: only known by leaving it */
        from->sanitizer_bottom = bottom;
        from->sanitizer_bytes = bytes;
    }
#else
    (void)self;
    (void)from;
#endif
}

static __thread struct fiber *fiber_from, *fiber_to; /* of the switch under way */

static void fiber_enter(void)
{
    struct fiber *self = fiber_to;
    fiber_arrived(self, fiber_from);
    self->entry(self->ctx);
    abort();
}

#if FIBER_BY_HAND
/* Keeps what a call must keep (System V): the rest is the caller's to save. */
extern "C" void shim_fiber_swap(void **save, void *stack_pointer);
asm(R"(
    .text
    .type shim_fiber_swap, @function
shim_fiber_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
    .size shim_fiber_swap, .-shim_fiber_swap
)");
#endif

void fiber_make(struct fiber *f, void *stack, size_t stack_bytes, void (*entry)(void *ctx), void *ctx)
{
    f->stack = stack;
    f->stack_bytes = stack_bytes;
    f->entry = entry;
    f->ctx = ctx;
    f->sanitizer_bottom = stack;
    f->sanitizer_bytes = stack_bytes;
#if defined(SHIM_TSAN)
    f->sanitizer_fiber = __tsan_create_fiber(0);
#endif
#if FIBER_BY_HAND
    /* Six registers, the address that ret goes to, and a slot that keeps the stack 16-byte aligned as after a call. */
    uintptr_t *top = reinterpret_cast<uintptr_t *>(static_cast<char *>(stack) + stack_bytes) - 2;
    *top = reinterpret_cast<uintptr_t>(&fiber_enter);
    top[1] = 0;
    memset(top - 6, 0, 6 * sizeof *top);
    f->stack_pointer = top - 6;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = stack;
    f->context.uc_stack.ss_size = stack_bytes;
    f->context.uc_link = NULL;
    makecontext(&f->context, fiber_enter, 0);
#endif
}

void fiber_release(struct fiber *f)
{
#if defined(SHIM_TSAN)
    if (f->sanitizer_fiber)
        __tsan_destroy_fiber(f->sanitizer_fiber);
#endif
    f->sanitizer_fiber = NULL;
}

void fiber_switch(struct fiber *from, struct fiber *to)
{
    fiber_from = from;
    fiber_to = to;
#if defined(SHIM_ASAN)
    __sanitizer_start_switch_fiber(&from->sanitizer_stack, to->sanitizer_bottom, to->sanitizer_bytes);
#endif
#if defined(SHIM_TSAN)
    if (!from->sanitizer_fiber)
        from->sanitizer_fiber = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to->sanitizer_fiber, 0);
#endif
#if FIBER_BY_HAND
    shim_fiber_swap(&from->stack_pointer, to->stack_pointer);
#else
    swapcontext(&from->context, &to->context);
#endif
    fiber_arrived(from, fiber_from);
}

/* --- a thread's machine ------------------------------------------------------------------------------------------ */

#define LANES 32
#define WARPS_MAX 32
#define THREADS_MAX (WARPS_MAX * LANES)
#define SHARED_MAX (227 * 1024) /* of a block, on the cards with the most */
#define GUARD_BYTES 256
#if defined(SHIM_ASAN) || defined(SHIM_TSAN)
#define STACK_BYTES (512 * 1024)
#else
#define STACK_BYTES (128 * 1024)
#endif

/* An asynchronous copy that was issued and not yet done. */
struct copy {
    unsigned char *to;
    const unsigned char *from;
    int bytes;
    uint32_t group;
};

/* A product of a group of warps that was issued and not yet done: one warp's part of it, one lane's registers. */
struct product {
    float *x;
    int columns;
    const uint32_t *registers;
    uint64_t a, b;
    bool add;
    uint32_t group, number; /* number: how many the thread issued before */
};

/* Sums with products under way: what they are where x itself is NaN. */
struct sums {
    float *x;
    int products;
    float values[128];
};

#define SUMS_MAX 8 /* of a thread, under way at a time */

struct thread {
    struct fiber fiber;
    struct copy *copies; /* (copies_max), oldest first */
    int copies_count, copies_max;
    uint32_t group; /* that the next copy belongs to: groups committed so far */

    struct product *products; /* (products_max), oldest first */
    int products_count, products_max;
    uint32_t products_group, products_issued;
    struct sums *sums[SUMS_MAX]; /* made when first needed; the first sums_count are under way */
    int sums_count;
    bool fenced;           /* wgmma_fence since the last wait */
    uint32_t proxy_fences; /* done */
};

/* Who last copied 16 bytes to shared memory: thread + 1, and how many proxy fences it had done by then. */
struct writer {
    uint32_t thread, proxy_fences;
};

#define ISSUED_MAX 256 /* products that one warp of a group may be ahead of another */

struct group {
    uint32_t issued;               /* products that one of its warps has issued */
    uint64_t operands[ISSUED_MAX]; /* what the last of them read then: a hash */
};

struct warp {
    uint32_t lanes;                                   /* that exist */
    uint32_t runnable, collective, blocked, returned; /* each lane is in one of them */
    enum shim_collective kind;                        /* of the lanes in `collective` */
    unsigned generation;                              /* collectives done */
    struct shim_slot slots[2][LANES];                 /* by generation: a lane may be one ahead of the slowest reader */
};

struct machine {
    struct fiber scheduler;
    struct thread *threads[THREADS_MAX]; /* made when first needed */
    struct warp warps[WARPS_MAX];
    unsigned thread_count, warp_count;
    unsigned blocked_count; /* threads at block_sync */
    int running_warp;       /* the last that ran, or −1: start from the order's first */
    unsigned now;           /* the thread that runs */
    const char *name;
    void (*call)(void *ctx);
    void *ctx;
    unsigned char *shared;
    size_t shared_bytes;
    uint64_t random;
    struct group groups[WARPS_MAX / WARP_GROUP];
    struct writer writers[SHARED_MAX / 16];
    float left[16][16], right[16][256]; /* of one warp's product */

    ~machine();
};

__thread struct uint3 threadIdx, blockIdx;
__thread struct dim3 blockDim, gridDim;

static thread_local struct machine the_machine;
static __thread struct machine *here; /* the_machine during a launch, else NULL */

static enum shim_order_kind order_kind;
static uint64_t order_seed;
static bool order_set;

static const char *collective_name(enum shim_collective kind)
{
    switch (kind) {
    case SHIM_WARP_SYNC:
        return "warp_sync";
    case SHIM_SHUFFLE_4:
    case SHIM_SHUFFLE_8:
        return "a shuffle";
    case SHIM_ANY:
        return "warp_any";
    case SHIM_LDMATRIX:
        return "ldmatrix_x4";
    case SHIM_LDMATRIX_TRANSPOSED:
        return "ldmatrix_x4_transposed";
    case SHIM_MMA:
        return "mma_16816";
    case SHIM_WGMMA_WAIT:
        return "wgmma_wait";
    }
    return "?";
}

#define FAIL(...) (fprintf(stderr, "shim: " __VA_ARGS__), fail_where())

[[noreturn]] static void fail_where(void)
{
    fputc('\n', stderr);
    if (here)
        fprintf(stderr, "shim: in %s, block (%u, %u, %u), thread %u, order %s seed %llu\n", here->name, blockIdx.x,
                blockIdx.y, blockIdx.z, here->now,
                order_kind == SHIM_FORWARD   ? "forward"
                : order_kind == SHIM_REVERSE ? "reverse"
                                             : "seeded",
                (unsigned long long)order_seed);
    fflush(stderr);
    abort();
}

void shim_order(enum shim_order_kind kind, uint64_t seed)
{
    order_kind = kind;
    order_seed = seed;
    order_set = true;
}

static bool order_from_environment(void)
{
    const char *text = getenv("CONSILIUM_SHIM_ORDER");
    if (order_set)
        return true;
    if (!text || !*text || strcmp(text, "forward") == 0)
        shim_order(SHIM_FORWARD, 0);
    else if (strcmp(text, "reverse") == 0)
        shim_order(SHIM_REVERSE, 0);
    else if (strncmp(text, "seed:", 5) == 0)
        shim_order(SHIM_SEEDED, strtoull(text + 5, NULL, 10));
    else
        FAIL("CONSILIUM_SHIM_ORDER is \"%s\": forward, reverse or seed:N are known", text);
    return true;
}

static uint32_t draw(struct machine *m, uint32_t bound)
{
    m->random ^= m->random << 13;
    m->random ^= m->random >> 7;
    m->random ^= m->random << 17;
    return (uint32_t)((m->random >> 32) * bound >> 32);
}

static void thread_main(void *)
{
    for (;;) {
        struct machine *m = here;
        m->call(m->ctx);
        struct warp *w = &m->warps[m->now / LANES];
        uint32_t bit = 1u << m->now % LANES;
        w->runnable &= ~bit;
        w->returned |= bit;
        fiber_switch(&m->threads[m->now]->fiber, &m->scheduler);
    }
}

static void thread_make(struct machine *m, unsigned index)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    struct thread *t = static_cast<struct thread *>(calloc(1, sizeof *t));
    void *at =
        mmap(NULL, page + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!t || at == MAP_FAILED || mprotect(at, page, PROT_NONE) != 0)
        FAIL("no memory for a thread's stack");
    fiber_make(&t->fiber, static_cast<char *>(at) + page, STACK_BYTES, thread_main, NULL);
    m->threads[index] = t;
}

machine::~machine()
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (struct thread *t : threads) {
        if (!t)
            continue;
        fiber_release(&t->fiber);
        munmap(static_cast<char *>(t->fiber.stack) - page, page + STACK_BYTES);
        free(t->copies);
        free(t->products);
        for (struct sums *sums : t->sums)
            free(sums);
        free(t);
    }
}

/* --- the order --------------------------------------------------------------------------------------------------- */

/* The next warp to run: the last one as long as it can, so that warps drift apart as far as the barriers let them. */
static int next_warp(struct machine *m)
{
    int last = m->running_warp;
    if (order_kind == SHIM_SEEDED) { /* turns of about 2 to 64 collectives, by the seed */
        if (last >= 0 && m->warps[last].runnable && draw(m, 64u << order_seed % 6) != 0)
            return last;
        unsigned start = draw(m, m->warp_count);
        for (unsigned i = 0; i < m->warp_count; i++) {
            unsigned w = (start + i) % m->warp_count;
            if (m->warps[w].runnable)
                return (int)w;
        }
        return -1;
    }
    if (last >= 0 && m->warps[last].runnable)
        return last;
    for (unsigned i = 0; i < m->warp_count; i++) {
        unsigned w = order_kind == SHIM_FORWARD ? i : m->warp_count - 1 - i;
        if (m->warps[w].runnable)
            return (int)w;
    }
    return -1;
}

static unsigned next_lane(struct machine *m, uint32_t runnable)
{
    if (order_kind == SHIM_FORWARD)
        return (unsigned)__builtin_ctz(runnable);
    if (order_kind == SHIM_REVERSE)
        return 31 - (unsigned)__builtin_clz(runnable);
    unsigned by = draw(m, LANES);
    uint32_t turned = by ? runnable >> by | runnable << (LANES - by) : runnable;
    return ((unsigned)__builtin_ctz(turned) + by) % LANES;
}

/* No thread can run: all have returned, or it is a kernel's mistake. */
static void check_end(struct machine *m)
{
    unsigned returned = 0;
    for (unsigned i = 0; i < m->warp_count; i++) {
        struct warp *w = &m->warps[i];
        returned += (unsigned)__builtin_popcount(w->returned);
        if (w->collective)
            FAIL("%s not reached by all lanes of warp %u: lanes %08x wait, %08x wait in block_sync, %08x returned",
                 collective_name(w->kind), i, w->collective, w->blocked, w->returned);
    }
    if (m->blocked_count)
        FAIL("barrier not reached by all threads: %u wait in block_sync, %u returned", m->blocked_count, returned);
}

static void run_block(struct machine *m)
{
    m->blocked_count = 0;
    m->running_warp = -1;
    for (unsigned i = 0; i < m->warp_count; i++) {
        struct warp *w = &m->warps[i];
        unsigned lanes = m->thread_count - i * LANES < LANES ? m->thread_count - i * LANES : LANES;
        w->lanes = w->runnable = lanes == LANES ? ~0u : (1u << lanes) - 1;
        w->collective = w->blocked = w->returned = 0;
    }
    for (unsigned i = 0; i < m->thread_count; i++) {
        struct thread *t = m->threads[i];
        t->copies_count = t->products_count = t->sums_count = 0;
        t->group = t->products_group = t->products_issued = t->proxy_fences = 0;
        t->fenced = false;
    }
    for (struct group &g : m->groups)
        g.issued = 0;
    memset(static_cast<void *>(m->writers), 0, (m->shared_bytes + 15) / 16 * sizeof m->writers[0]);
    for (int w = next_warp(m); w >= 0; w = next_warp(m)) {
        m->running_warp = w;
        m->now = (unsigned)w * LANES + next_lane(m, m->warps[w].runnable);
        threadIdx.x = m->now;
        fiber_switch(&m->scheduler, &m->threads[m->now]->fiber);
    }
    check_end(m);
}

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* Bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical specifications). */
static size_t shared_limit(int capability)
{
    if (capability >= 120 || capability == 86 || capability == 89)
        return 99 * 1024;
    if (capability >= 90)
        return SHARED_MAX;
    return capability >= 80 ? 163 * 1024 : 64 * 1024;
}

void shim_run(const char *name, struct dim3 grid, struct dim3 block, size_t shared_bytes, void (*call)(void *ctx),
              void *ctx)
{
    struct machine *m = &the_machine;
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z, start = 0, step = 1;
    unsigned threads = block.x;

    static const bool looked = order_from_environment(); /* by one of the threads */
    (void)looked;
    if (here)
        FAIL("%s launched by a kernel", name);
    m->name = name;
    if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
        FAIL("%s: a grid of %u x %u x %u blocks", name, grid.x, grid.y, grid.z);
    if (block.y != 1 || block.z != 1 || threads == 0 || threads > THREADS_MAX)
        FAIL("%s: a block of %u x %u x %u threads", name, block.x, block.y, block.z);
    if (shared_bytes > shared_limit(device_capability()))
        FAIL("%s: %zu bytes of shared memory", name, shared_bytes);

    void *shared = NULL;
#if defined(SHIM_ASAN)
    size_t guard = 0;
#else
    size_t guard = GUARD_BYTES;
#endif
    if (posix_memalign(&shared, 1024, shared_bytes + guard ? shared_bytes + guard : 1) != 0)
        FAIL("no memory");
    m->shared = static_cast<unsigned char *>(shared);
    m->shared_bytes = shared_bytes;
    m->call = call;
    m->ctx = ctx;
    m->thread_count = threads;
    m->warp_count = (threads + LANES - 1) / LANES;
    m->random = (order_seed + 1) * 0x9e3779b97f4a7c15u;
    for (unsigned i = 0; i < threads; i++) {
        if (!m->threads[i])
            thread_make(m, i);
    }
    if (order_kind == SHIM_REVERSE) {
        start = blocks - 1;
        step = blocks - 1; /* −1 */
    } else if (order_kind == SHIM_SEEDED) {
        uint32_t bound = blocks < UINT32_MAX ? (uint32_t)blocks : UINT32_MAX;
        start = draw(m, bound);
        do
            step = 1 + draw(m, bound);
        while (common_divisor(blocks, step) != 1);
    }
    here = m;
    gridDim = grid;
    blockDim = block;
    threadIdx = {0, 0, 0};
    for (uint64_t i = 0, at = start; i < blocks; i++, at = (at + step) % blocks) {
        blockIdx.x = (unsigned)(at % grid.x);
        blockIdx.y = (unsigned)(at / grid.x % grid.y);
        blockIdx.z = (unsigned)(at / grid.x / grid.y);
        memset(m->shared, 0xff, shared_bytes + guard);
        run_block(m);
        for (size_t g = 0; g < guard; g++) {
            if (m->shared[shared_bytes + g] != 0xff)
                FAIL("byte %zu behind %zu bytes of shared memory was written", g, shared_bytes);
        }
    }
    here = NULL;
    free(shared);
}

/* --- what kernels call ------------------------------------------------------------------------------------------- */

static struct machine *machine_in(const char *what)
{
    if (!here)
        FAIL("%s outside a kernel", what);
    return here;
}

unsigned char *shim_shared(void)
{
    return machine_in("DYNAMIC_SHARED")->shared;
}

static void wait_here(struct machine *m)
{
    fiber_switch(&m->threads[m->now]->fiber, &m->scheduler);
}

void shim_block_sync(void)
{
    struct machine *m = machine_in("block_sync");
    struct warp *w = &m->warps[m->now / LANES];
    uint32_t bit = 1u << m->now % LANES;
    w->runnable &= ~bit;
    w->blocked |= bit;
    if (++m->blocked_count == m->thread_count) {
        m->blocked_count = 0;
        m->running_warp = -1;
        for (unsigned i = 0; i < m->warp_count; i++) {
            m->warps[i].runnable = m->warps[i].lanes;
            m->warps[i].blocked = 0;
        }
    }
    wait_here(m);
}

const struct shim_slot *shim_exchange(enum shim_collective kind, const void *operand, size_t bytes)
{
    struct machine *m = machine_in(collective_name(kind));
    struct warp *w = &m->warps[m->now / LANES];
    unsigned lane = m->now % LANES;
    struct shim_slot *slots = w->slots[w->generation & 1];

    if (w->lanes != ~0u)
        FAIL("%s in a warp of %d lanes", collective_name(kind), __builtin_popcount(w->lanes));
    if (w->collective && w->kind != kind)
        FAIL("a lane in %s, where lanes %08x of its warp wait in %s", collective_name(kind), w->collective,
             collective_name(w->kind));
    w->kind = kind;
    if (bytes)
        memcpy(slots[lane].bytes, operand, bytes);
    w->runnable &= ~(1u << lane);
    w->collective |= 1u << lane;
    if (w->collective == ~0u) {
        w->generation++;
        w->runnable = ~0u;
        w->collective = 0;
    }
    wait_here(m);
    return slots;
}

static void check_shared(struct machine *m, const char *what, const void *at)
{
    uintptr_t p = reinterpret_cast<uintptr_t>(at), base = reinterpret_cast<uintptr_t>(m->shared);
    if (p % 16 != 0)
        FAIL("%s: shared memory at byte %zd, not 16-byte aligned", what, (ptrdiff_t)(p - base));
    if (p < base || p + 16 > base + m->shared_bytes)
        FAIL("%s: byte %zd of %zu bytes of shared memory", what, (ptrdiff_t)(p - base), m->shared_bytes);
}

const struct shim_slot *shim_exchange_row(enum shim_collective kind, const void *row)
{
    check_shared(machine_in(collective_name(kind)), collective_name(kind), row);
    return shim_exchange(kind, row, 16);
}

/* PTX ISA, mma.m16n8k16: lane 4i + j holds of a: rows i (registers 0, 2) and i + 8 (1, 3), columns 2j, 2j + 1 and, in
 * registers 2 and 3, 8 on; of b: column i, rows 2j, 2j + 1 and 8 on; of d: rows i and i + 8, columns 2j and 2j + 1. */
void shim_mma(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    uint32_t operand[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const struct shim_slot *slots = shim_exchange(SHIM_MMA, operand, sizeof operand);
    unsigned lane = threadIdx.x % LANES, i = lane / 4, j = lane % 4;
    float rows[2][16], columns[2][16];

    for (unsigned k = 0; k < 16; k += 2) {
        for (unsigned h = 0; h < 2; h++) {
            uint32_t pair;
            memcpy(&pair, slots[4 * i + k / 2 % 4].bytes + 4 * (h + k / 8 * 2), 4);
            rows[h][k] = __uint_as_float(pair << 16);
            rows[h][k + 1] = __uint_as_float(pair & 0xffff0000);
            memcpy(&pair, slots[4 * (2 * j + h) + k / 2 % 4].bytes + 16 + 4 * (k / 8), 4);
            columns[h][k] = __uint_as_float(pair << 16);
            columns[h][k + 1] = __uint_as_float(pair & 0xffff0000);
        }
    }
    float sums[4] = {d[0], d[1], d[2], d[3]}; /* side by side */
    for (unsigned k = 0; k < 16; k++) {
        sums[0] += rows[0][k] * columns[0][k];
        sums[1] += rows[0][k] * columns[1][k];
        sums[2] += rows[1][k] * columns[0][k];
        sums[3] += rows[1][k] * columns[1][k];
    }
    memcpy(d, sums, sizeof sums);
}

void shim_async_copy(void *to, const void *from, int bytes)
{
    struct machine *m = machine_in("async_copy_16");
    struct thread *t = m->threads[m->now];
    check_shared(m, "async_copy_16", to);
    if (bytes < 0 || bytes > 16)
        FAIL("async_copy_16 of %d bytes", bytes);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
        FAIL("async_copy_16 from an address that is not 16-byte aligned");
    if (t->copies_count == t->copies_max) {
        t->copies_max = t->copies_max ? 2 * t->copies_max : 16;
        t->copies = static_cast<struct copy *>(realloc(t->copies, (size_t)t->copies_max * sizeof *t->copies));
        if (!t->copies)
            FAIL("no memory");
    }
    memset(to, 0xff, 16);
    t->copies[t->copies_count++] = {static_cast<unsigned char *>(to), static_cast<const unsigned char *>(from), bytes,
                                    t->group};
}

void shim_async_commit(void)
{
    struct machine *m = machine_in("async_commit");
    m->threads[m->now]->group++;
}

void shim_async_wait(int pending)
{
    struct machine *m = machine_in("async_wait");
    struct thread *t = m->threads[m->now];
    int done = 0;
    for (; done < t->copies_count && (int64_t)t->copies[done].group < (int64_t)t->group - pending; done++) {
        const struct copy *c = &t->copies[done];
        memset(c->to, 0, 16);
        if (c->bytes)
            memcpy(c->to, c->from, (size_t)c->bytes);
        m->writers[(c->to - m->shared) / 16] = {m->now + 1, t->proxy_fences};
    }
    t->copies_count -= done;
    if (t->copies_count)
        memmove(t->copies, t->copies + done, (size_t)t->copies_count * sizeof *t->copies);
}

/* --- products of a group of warps -------------------------------------------------------------------------------- */

uint32_t shim_shared_address(const void *at)
{
    struct machine *m = machine_in("shared_address");
    return (uint32_t)(static_cast<const unsigned char *>(at) - m->shared);
}

void shim_trap(void)
{
    machine_in("trap");
    FAIL("trap");
}

void shim_proxy_fence(void)
{
    struct machine *m = machine_in("proxy_fence");
    m->threads[m->now]->proxy_fences++;
}

void shim_wgmma_fence(void)
{
    struct machine *m = machine_in("wgmma_fence");
    m->threads[m->now]->fenced = true;
}

void shim_wgmma_commit(void)
{
    struct machine *m = machine_in("wgmma_commit");
    m->threads[m->now]->products_group++;
}

/* The 16 bytes `unit` of row `row` of the matrix that cuda.h's wgmma_matrix describes. */
static const unsigned char *matrix_unit(const struct machine *m, uint64_t matrix, unsigned row, unsigned unit)
{
    unsigned start = (unsigned)(matrix & 0x3fff) << 4, panel = (unsigned)(matrix >> 16 & 0x3fff) << 4,
             eight = (unsigned)(matrix >> 32 & 0x3fff) << 4;
    if (matrix >> 62 != 1 || start % 1024 >= 128)
        FAIL("wgmma: a matrix at byte %u, not in panels that begin at multiples of 1024", start);
    unsigned at = start + unit / 8 * panel + unit % 8 * 16 + row / 8 * eight + row % 8 * 128;
    at ^= (at >> 7 & 7) << 4;
    if (at + 16 > m->shared_bytes)
        FAIL("wgmma: byte %u of %zu bytes of shared memory", at, m->shared_bytes);
    return m->shared + at;
}

static uint64_t hash_matrix(const struct machine *m, uint64_t matrix, unsigned rows, unsigned units, uint64_t hash)
{
    for (unsigned r = 0; r < rows; r++) {
        for (unsigned u = 0; u < units; u++) {
            uint64_t words[2];
            memcpy(words, matrix_unit(m, matrix, r, u), 16);
            hash = (hash ^ words[0]) * 0x9e3779b97f4a7c15u;
            hash = (hash ^ hash >> 29 ^ words[1]) * 0xbf58476d1ce4e5b9u;
        }
    }
    return hash;
}

/* Of all that a group reads from shared memory for a product. */
static uint64_t hash_operands(const struct machine *m, const struct product *p)
{
    unsigned columns = (unsigned)p->columns;
    if (p->registers)
        return hash_matrix(m, p->b, 16, columns / 8, 1);
    return hash_matrix(m, p->b, columns, 2, hash_matrix(m, p->a, 64, 2, 1));
}

static struct sums *sums_of(struct thread *t, const float *x)
{
    for (int i = 0; i < t->sums_count; i++) {
        if (t->sums[i]->x == x)
            return t->sums[i];
    }
    return NULL;
}

void shim_wgmma(float *x, int columns, const uint32_t *registers, uint64_t a, uint64_t b, bool add)
{
    struct machine *m = machine_in("wgmma");
    struct thread *t = m->threads[m->now];
    struct group *g = &m->groups[m->now / LANES / WARP_GROUP];
    struct sums *sums = sums_of(t, x);
    size_t bytes = (size_t)columns / 2 * sizeof *x;

    if (m->thread_count % (WARP_GROUP * LANES) != 0)
        FAIL("wgmma in a block of %u threads, not of whole groups", m->thread_count);
    if (!sums) {
        if (!t->fenced)
            FAIL("wgmma without a wgmma_fence since the last wait");
        if (t->sums_count == SUMS_MAX)
            FAIL("wgmma: more than %d sums under way", SUMS_MAX);
        struct sums **place = &t->sums[t->sums_count++];
        if (!*place && !(*place = static_cast<struct sums *>(malloc(sizeof **place))))
            FAIL("no memory");
        sums = *place;
        sums->x = x;
        sums->products = 0;
        memcpy(sums->values, x, bytes);
        memset(x, 0xff, bytes);
    }
    sums->products++;
    if (t->products_count == t->products_max) {
        t->products_max = t->products_max ? 2 * t->products_max : 64;
        t->products =
            static_cast<struct product *>(realloc(t->products, (size_t)t->products_max * sizeof *t->products));
        if (!t->products)
            FAIL("no memory");
    }
    struct product *p = &t->products[t->products_count++];
    *p = {x, columns, registers, a, b, add, t->products_group, t->products_issued};
    if (g->issued == t->products_issued)
        g->operands[g->issued++ % ISSUED_MAX] = hash_operands(m, p);
    t->products_issued++;
}

/* Eight elements as floats, which must have been made visible to products. */
static void read_unit(const struct machine *m, uint64_t matrix, unsigned row, unsigned unit, float to[8])
{
    const unsigned char *at = matrix_unit(m, matrix, row, unit);
    const struct writer *w = &m->writers[(at - m->shared) / 16];
    if (w->thread && m->threads[w->thread - 1]->proxy_fences == w->proxy_fences)
        FAIL("wgmma: byte %zd of shared memory was copied there by thread %u, without a proxy_fence since",
             (ptrdiff_t)(at - m->shared), w->thread - 1);
    for (unsigned i = 0; i < 8; i++) {
        uint16_t bits;
        memcpy(&bits, at + 2 * i, sizeof bits);
        to[i] = __uint_as_float((uint32_t)bits << 16);
    }
}

static void read_operands(struct machine *m, unsigned warp, int index)
{
    const struct product *p = &m->threads[warp * LANES]->products[index];
    unsigned columns = (unsigned)p->columns;
    for (unsigned lane = 0; lane < LANES && p->registers; lane++) { /* as in shim_mma */
        const uint32_t *registers = m->threads[warp * LANES + lane]->products[index].registers;
        for (unsigned i = 0; i < 4; i++) {
            float *at = &m->left[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8];
            at[0] = __uint_as_float(registers[i] << 16);
            at[1] = __uint_as_float(registers[i] & 0xffff0000);
        }
    }
    for (unsigned k = 0; k < 16 && p->registers; k++) {
        for (unsigned u = 0; u < columns / 8; u++)
            read_unit(m, p->b, k, u, &m->right[k][8 * u]);
    }
    for (unsigned r = 0; r < 16 && !p->registers; r++) {
        for (unsigned u = 0; u < 2; u++)
            read_unit(m, p->a, warp % WARP_GROUP * 16 + r, u, &m->left[r][8 * u]);
    }
    for (unsigned c = 0; c < columns && !p->registers; c++) {
        float terms[16];
        read_unit(m, p->b, c, 0, terms);
        read_unit(m, p->b, c, 1, terms + 8);
        for (unsigned k = 0; k < 16; k++)
            m->right[k][c] = terms[k];
    }
}

/* A warp's part of the product that is its lanes' index-th. */
static void run_product(struct machine *m, unsigned warp, int index)
{
    const struct product *p = &m->threads[warp * LANES]->products[index];
    struct sums *sums[LANES];
    for (unsigned lane = 0; lane < LANES; lane++) {
        struct thread *t = m->threads[warp * LANES + lane];
        const struct product *q = &t->products[index];
        if (index >= t->products_count || q->columns != p->columns || !q->registers != !p->registers || q->a != p->a ||
            q->b != p->b || q->add != p->add || q->group != p->group || q->number != p->number)
            FAIL("wgmma: lanes 0 and %u of warp %u have different products", lane, warp);
        sums[lane] = sums_of(t, q->x);
    }
    const struct group *g = &m->groups[warp / WARP_GROUP];
    if (g->issued - p->number > ISSUED_MAX)
        FAIL("wgmma: a warp is %u products behind", g->issued - p->number);
    if (g->operands[p->number % ISSUED_MAX] != hash_operands(m, p))
        FAIL("wgmma: shared memory changed under a product");

    read_operands(m, warp, index);
    for (unsigned r = 0; r < 16; r++) {
        struct sums **of_row = &sums[r % 8 * 4];
        for (int n = 0; n < p->columns / 8; n++) {
            float x[8] = {};
            for (int i = 0; i < 8 && p->add; i++)
                x[i] = of_row[i / 2]->values[n * 4 + (int)r / 8 * 2 + i % 2];
            for (unsigned k = 0; k < 16; k++) {
                for (int i = 0; i < 8; i++)
                    x[i] += m->left[r][k] * m->right[k][8 * n + i];
            }
            for (int i = 0; i < 8; i++)
                of_row[i / 2]->values[n * 4 + (int)r / 8 * 2 + i % 2] = x[i];
        }
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (--sums[lane]->products > 0)
            continue;
        struct thread *t = m->threads[warp * LANES + lane];
        memcpy(sums[lane]->x, sums[lane]->values, (size_t)p->columns / 2 * sizeof(float));
        for (int i = 0; i < t->sums_count; i++) {
            if (t->sums[i] == sums[lane]) {
                t->sums[i] = t->sums[--t->sums_count];
                t->sums[t->sums_count] = sums[lane];
                break;
            }
        }
    }
}

/* The last lane to come does what the warp waits for. */
void shim_wgmma_wait(int pending)
{
    struct machine *m = machine_in("wgmma_wait");
    unsigned warp = m->now / LANES;
    const struct warp *w = &m->warps[warp];
    struct thread *t = m->threads[m->now];
    t->fenced = false;
    if ((w->collective | 1u << m->now % LANES) == ~0u && w->kind == SHIM_WGMMA_WAIT) {
        const struct thread *first = m->threads[warp * LANES];
        int done = 0;
        for (; done < first->products_count &&
               (int64_t)first->products[done].group < (int64_t)first->products_group - pending;
             done++)
            run_product(m, warp, done);
        for (unsigned lane = 0; lane < LANES; lane++) {
            struct thread *of = m->threads[warp * LANES + lane];
            of->products_count -= done;
            if (of->products_count)
                memmove(of->products, of->products + done, (size_t)of->products_count * sizeof *of->products);
        }
    }
    shim_exchange(SHIM_WGMMA_WAIT, NULL, 0);
}
