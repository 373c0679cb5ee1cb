/* Internal to kernels/cuda: the opened device, shared by the files of the table (backend.cu, weights.cu, segments.cu,
 * serve.cu). */
#ifndef KERNELS_CUDA_BACKEND_H
#define KERNELS_CUDA_BACKEND_H

#include "base/megabytes.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/internal.h"
#include "kernels/cuda/product.h"

struct allocation {
    void *at;
    size_t bytes;
};

/* Memory that grows to the largest of what it was asked for. */
struct work {
    void *at;
    size_t bytes;
};

/* Small uploads go through a ring of pinned slots, so that the caller need not wait for what is before them. */
#define UPLOAD_SLOTS 8
#define UPLOAD_SLOT_BYTES ((size_t)1 << 20)

struct cuda {
    struct backend base;
    struct backend_cuda_options options;
    struct device_info info; /* of the opening */
    stream_t stream, side;   /* noise is drawn on the side */
    struct products *products;
    struct error latched; /* code 0: none */

    uint8_t *upload_slots;                          /* pinned (UPLOAD_SLOTS, UPLOAD_SLOT_BYTES) */
    struct device_mark *upload_marks[UPLOAD_SLOTS]; /* when each slot's copy is done */
    int upload_next;
    bool decode_each_use; /* quantised weights that are placed now get no dense copy */
    uint64_t epoch;       /* counts the times that work memory moved: what was recorded before is void */

    size_t used_bytes, limit_bytes;
    struct allocation *allocations;
    int32_t allocation_count, allocation_room;

    /* Grown by reserve(); null until then. */
    struct work delta, attention, logits, clip, clip_results, matrix, lora, lora_hidden, hidden, decode, rows, noise,
        sums, chosen;
    void *rows_host;      /* pinned; as long as rows */
    int32_t *failed;      /* dev: becomes 1 if noise could not be drawn or a sum left 64 bits */
    int32_t *failed_host; /* pinned */
    size_t noise_count;   /* begun and not added yet */
    int32_t rows_max, rounds, length_bucket, pass_rows; /* of pieces_set */
    struct kv_layout kv_layout;
};

static inline struct cuda *cuda_of(struct backend *be)
{
    return reinterpret_cast<struct cuda *>(be);
}

void cuda_latch(struct cuda *c, int code, const char *what);
/* Memory with its bytes counted against the limit; as backend.h's alloc. */
int cuda_alloc(struct backend *be, size_t bytes, void **ret, struct error *err);
void cuda_release(struct backend *be, void *at);
int cuda_work(struct cuda *c, struct work *work, size_t bytes, struct error *err);

/* --- weights.cu -------------------------------------------------------------------------------------------------- */

/* One linear of a group as its file has it, on the device; NULL where there is a dense matrix. */
struct given_matrix {
    void *at;
    enum tensor_type type;
    size_t row_bytes;
};

/* What linear_group.placed is: see product.h for the augmented matrix. */
struct cuda_group {
    int32_t out_total, in;
    int32_t lora_rows; /* R */
    int32_t stride;    /* in + R */
    void *matrix;      /* (out_total + R, stride) of the element; NULL: decoded into cuda.matrix at each use */
    struct given_matrix given[BACKEND_GROUP_MAX];
    struct group_lora loaded; /* by lora_load; rank 0: none */
    int32_t loaded_rank;      /* all members' */
};

int cuda_group_new(struct backend *be, int32_t count, const struct tensor *const w[], int32_t rank_max,
                   struct linear_group *ret, struct error *err);
void cuda_group_free(struct backend *be, struct linear_group *group);
void cuda_lora_load(struct backend *be, int32_t count, struct linear_group *const groups[],
                    const struct group_lora loras[]);
/* The group's augmented matrix, decoded now if it is not kept. with_lora: LoRA's parts hold the loaded factors. */
const void *cuda_matrix(struct cuda *c, const struct linear_group *group, bool with_lora);
size_t cuda_logits_bytes(const struct cuda *c, int32_t rows, int32_t vocabulary);
int cuda_weights_fit(struct backend *be, size_t values, size_t given_bytes, struct error *err);
void cuda_lora_down(struct backend *be, const struct linear_group *g, const struct group_lora *lora, int32_t m,
                    struct rows x, struct rows h);
void cuda_group_forward(struct backend *be, enum group_use use, const struct linear_group *g,
                        const struct group_lora *lora, int32_t m, struct rows x, const struct rows y[], struct rows h);
void cuda_group_backward(struct backend *be, const struct linear_group *g, const struct group_lora *lora, int32_t m,
                         const struct rows dy[], struct rows dh, bool with_dh, struct rows dx);
void cuda_embed(struct backend *be, int32_t m, const struct linear_group *table, const int32_t *ids, float scale,
                struct rows y);
void cuda_cross_entropy(struct backend *be, const struct linear_group *head, const struct placed_labels *labels,
                        struct rows x, float *losses, struct rows dx);
void cuda_logits(struct backend *be, const struct linear_group *head, int32_t m, struct rows x, float *logits);
void cuda_likeliest(struct backend *be, const struct linear_group *head, int32_t m, struct rows x, int32_t *ids);

/* --- segments.cu ------------------------------------------------------------------------------------------------- */

int cuda_segments_new(struct backend *be, int32_t rows_max, int32_t count_max, struct placed_segments *ret,
                      struct error *err);
size_t cuda_sums_bytes(int32_t rows, size_t values);
void cuda_segments_free(struct backend *be, struct placed_segments *segments);
void cuda_segments_set(struct backend *be, struct placed_segments *segments, int32_t count, const int32_t *offsets);
void cuda_group_gradients(struct backend *be, const struct linear_group *g, const struct group_lora *lora,
                          const struct placed_segments *segments, const struct rows dy[], struct rows h, struct rows dh,
                          struct rows x, const struct group_gradient *where, float *base, size_t stride);
void cuda_attention_forward(struct backend *be, const struct attention_shape *shape,
                            const struct placed_segments *segments, int32_t m, struct rows q, struct rows k,
                            struct rows v, struct rows o, float *lse);
void cuda_attention_backward(struct backend *be, const struct attention_shape *shape,
                             const struct placed_segments *segments, int32_t m, struct rows q, struct rows k,
                             struct rows v, struct rows o, const float *lse, struct rows do_, struct rows dq,
                             struct rows dk, struct rows dv);

/* --- serve.cu ---------------------------------------------------------------------------------------------------- */

int cuda_kv_new(struct backend *be, int32_t layers, int32_t kv_heads, int32_t head_size, int32_t length_max,
                struct kv **ret, struct error *err);
void cuda_kv_free(struct backend *be, struct kv *kv);
void cuda_kv_copy(struct backend *be, struct kv *to, const struct kv *from, int32_t length);
uint64_t cuda_pieces_set(struct backend *be, const struct kv_piece *pieces, int32_t count);
void cuda_attend(struct backend *be, const struct attention_shape *shape, int32_t layer, struct rows q, struct rows k,
                 struct rows v, struct rows o);

#endif
