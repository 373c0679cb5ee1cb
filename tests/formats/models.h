/*
 * Tiny models of every architecture, as GGUF files and as the files of a Hugging Face folder, in memory, right or with
 * one thing wrong. Every tensor holds one value all over, which tells which tensor it is: models_value().
 */
#ifndef TESTS_FORMATS_MODELS_H
#define TESTS_FORMATS_MODELS_H

#include "model/formats/gguf_write.h"
#include "model/formats/safetensors.h"
#include "model/model.h"

#include <jansson.h>

enum { MODELS_D = 32, MODELS_HEADS = 2, MODELS_KV = 1, MODELS_HEAD = 16, MODELS_FF = 48, MODELS_VOCABULARY = 40 };

/* Seven layers, so that one of gemma3's six sees everything. */
#define MODELS_LAYERS 7

struct models_flaw {
    const char *drop;                    /* leave this key, field or tensor out */
    const char *reshape;                 /* give this tensor one row more */
    const char *poison;                  /* put a NaN into it */
    const char *extra;                   /* add this tensor: a vector of MODELS_D */
    const char *edit;                    /* a JSON object: fields of config.json to set */
    const char *dtype;                   /* of the tensor `poison`, instead of its own */
    bool untied;                         /* a head of its own */
    bool misaligned;                     /* a tensor of one byte before all others */
    void (*more)(struct gguf_writer *w); /* further metadata */
};

/* The tensors of a layer, by their place in struct model_layer. */
struct models_row {
    size_t offset;
    const char *gguf, *hf; /* names without "blk.N." and "model.layers.N." */
    int32_t out, in;       /* in 0: a vector of `out` */
};
size_t models_rows(enum model_architecture architecture, struct models_row rows[16]); /* returns how many */
float models_value(int32_t layer, size_t row); /* layer -1: 0 embedding, 1 last norm, 2 head */

void models_gguf(enum model_architecture architecture, const struct models_flaw *flaw, struct buffer *out);
void models_config(enum model_architecture architecture, const struct models_flaw *flaw, struct buffer *out);
/* The tensors from `first` layer on, up to `end`; the layer -1 stands for those outside layers. */
void models_weights(enum model_architecture architecture, const struct models_flaw *flaw, int32_t first, int32_t end,
                    struct buffer *out);

/* Fails the test unless all of the model's tensors are where they belong; shift: of gemma3's norms. */
void models_expect(const struct model *model, float shift);

#endif
