/*
 * What jobs name a base model by.
 *
 * A GGUF file: its SHA-256. A folder: the labelled hash (crypto/hash.h) "consilium/base-folder/v1" over, for each part
 * in model_file.h's order, its name, its size (u64) and its SHA-256. Both change with any byte that the model or its
 * tokenizer is made from, and neither with anything else in the folder.
 *
 * Reads everything once. No state: any thread.
 *
 *     uint8_t hash[HASH_SIZE];
 *     base_hash(file, hash);
 */
#ifndef NODE_BASE_HASH_H
#define NODE_BASE_HASH_H

#include "crypto/hash.h"
#include "model/formats/model_file.h"

void base_hash(const struct model_file *file, uint8_t out[HASH_SIZE]);
/* The same of what lies at path, which is opened for it alone. Errors: model_file_open's. */
int MUST_USE base_hash_path(const char *path, uint8_t ret_hash[HASH_SIZE], struct error *err);

#endif
