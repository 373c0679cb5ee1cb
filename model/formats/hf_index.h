/*
 * model.safetensors.index.json: which shard holds which tensor of a model that is spread over several files.
 *
 * File names from it are opened, so they must be plain names: letters, digits, '-', '_' and '.', not starting with '.',
 * ending with .safetensors. Immutable once parsed; the strings are its own.
 *
 *     struct hf_index *index;
 *     if (hf_index_parse(bytes, "model.safetensors.index.json", &index, err) < 0) ...
 *     for (size_t i = 0; i < hf_index_shard_count(index); i++) open(hf_index_shard(index, i)) ...
 *     hf_index_free(index);
 */
#ifndef FORMATS_HF_INDEX_H
#define FORMATS_HF_INDEX_H

#include "model/formats/safetensors.h"

#define HF_INDEX_BYTES_MAX ((size_t)4 << 20)
#define HF_SHARDS_MAX 1024u

struct hf_index;

int MUST_USE hf_index_parse(struct span json, const char *file, struct hf_index **ret_index, struct error *err);
void hf_index_free(struct hf_index *index); /* accepts NULL */

size_t hf_index_shard_count(const struct hf_index *index);
const char *hf_index_shard(const struct hf_index *index, size_t i); /* in the order of their bytes */

/* Every tensor of the index is in the shard that it names, and every tensor of a shard in the index. shards[i]: the
 * file of hf_index_shard(i). */
int MUST_USE hf_index_check(const struct hf_index *index, const struct safetensors *const *shards, struct error *err);

/* The shard that holds a tensor, or -1. */
int32_t hf_index_find(const struct hf_index *index, const char *tensor);

#endif
