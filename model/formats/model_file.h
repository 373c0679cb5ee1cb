/*
 * A base model on disk, in either form: a GGUF file, or a Hugging Face folder (config.json; model.safetensors or
 * model.safetensors.index.json with its shards; tokenizer.json; and, where they are there, tokenizer_config.json and
 * chat_template.jinja).
 *
 * Owns the maps that the model's tensors lie in. Files of a folder must be regular files, not symbolic links: what is
 * opened is what lies in the folder. Immutable once opened: any number of threads may share one.
 *
 * What identifies the model are its parts: of a GGUF file the file alone; of a folder config.json, tokenizer.json,
 * tokenizer_config.json, chat_template.jinja (those that are there) and then the files of weights in the order of their
 * names' bytes. The index is none: it only repeats what the shards hold. node/base_hash.h hashes them.
 *
 *     struct model_file *file;
 *     struct tokenizer *tokenizer;
 *     if (model_file_open(path, &file, err) < 0 || model_file_tokenizer(file, &tokenizer, err) < 0) ...
 *     use(model_file_model(file), tokenizer);
 *     tokenizer_free(tokenizer);
 *     model_file_close(file);
 */
#ifndef FORMATS_MODEL_FILE_H
#define FORMATS_MODEL_FILE_H

#include "model/formats/tokenizer.h"
#include "model/model.h"

struct model_file_part {
    const char *name; /* within the folder; of a GGUF file its own */
    struct span bytes;
};

struct model_file;

/* ERR_NOT_FOUND, ERR_INTEGRITY (names file and field), ERR_CONFIG (not a regular file), ERR_RESOURCES. */
int MUST_USE model_file_open(const char *path, struct model_file **ret_file, struct error *err);
void model_file_close(struct model_file *file); /* accepts NULL */

const char *model_file_name(const struct model_file *file); /* without the folders above */
const struct model *model_file_model(const struct model_file *file);
bool model_file_is_folder(const struct model_file *file);

/* The tokenizer that came with the model, which knows no id outside its embedding. Caller: tokenizer_free. */
int MUST_USE model_file_tokenizer(const struct model_file *file, struct tokenizer **ret_tokenizer, struct error *err);

size_t model_file_part_count(const struct model_file *file); /* at least 1 */
struct model_file_part model_file_part(const struct model_file *file, size_t i);

#endif
