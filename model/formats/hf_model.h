/*
 * A base model from a Hugging Face folder's files: config.json and safetensors (BF16, F16 or F32), in one file or in
 * shards with an index.
 *
 * Matrices are borrowed where they lie aligned for their type, and copied otherwise; norms and biases become F32 copies
 * (gemma3's norms + 1, as its GGUF files have them). The rows of q and k stay in the folder's order, which rope_order
 * says. Checked as GGUF files are: every field, every shape against the hyper-parameters, every value finite (which
 * reads all weights once), and no tensor left over: one that nobody uses would give wrong answers silently.
 *
 * Immutable: any number of threads may share one. The bytes must outlive it.
 *
 *     struct hf_file weights = {"model.safetensors", map};
 *     struct hf_model *hf;
 *     if (hf_model_parse("folder", config_json, NULL, &weights, &hf, err) < 0) ...
 *     ... hf_model_get(hf) ...
 *     hf_model_free(hf);
 */
#ifndef FORMATS_HF_MODEL_H
#define FORMATS_HF_MODEL_H

#include "model/formats/hf_index.h"
#include "model/model.h"

struct hf_file {
    const char *name;
    struct span bytes;
};

struct hf_model;

/* name: the folder's, before each message. index NULL: files is the one file of weights; otherwise files[i] is
 * hf_index_shard(index, i). index is used during the call only. ERR_INTEGRITY names file and field; ERR_RESOURCES. */
int MUST_USE hf_model_parse(const char *name, struct span config_json, const struct hf_index *index,
                            const struct hf_file *files, struct hf_model **ret_model, struct error *err);
void hf_model_free(struct hf_model *hf); /* accepts NULL */

const struct model *hf_model_get(const struct hf_model *hf);

#endif
