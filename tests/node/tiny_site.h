/* What the tests of node/ share: a site with a tiny random llama in a temporary folder, and adapters for it. */
#ifndef TESTS_NODE_TINY_SITE_H
#define TESTS_NODE_TINY_SITE_H

#include "node/serve/slot.h"
#include "node/settings.h"
#include "node/site.h"

/*
 * Two layers, width 64, a context of 4096 tokens and the small vocabulary of tests/golden/tokens.json. The head's rows
 * for control tokens are zero: greedy answers never end by themselves.
 */
struct tiny_site {
    char folder[64]; /* temporary, removed by tiny_site_release */
    struct config *config;
    struct site site;
};

/* serve: lines under "serve:" in node.yaml ("  listen: unix:...\n"), where %s stands for the folder; NULL: none. model:
 * another GGUF file or folder to open instead; NULL: the tiny one, a Hugging Face folder where the environment's
 * CONSILIUM_TEST_FORM is "folder". Fails the test on any error. */
void tiny_site_open(struct tiny_site *t, const char *serve, const char *model);
void tiny_site_release(struct tiny_site *t);
/* Another configuration for the same site; device: lines under "device:", NULL: the CPU. Caller: config_free. */
struct config *tiny_site_config(const struct tiny_site *t, const char *serve, const char *device);

/* The tiny model alone, as a GGUF file or as a folder with two shards. type: of the matrices, F32 or BF16; the weights
 * of BF16 are those of F32 cut off. */
void tiny_site_write_model(const char *path, enum tensor_type type);
void tiny_site_write_folder(const char *path, enum tensor_type type);
/* A file or folder, with all that is in it. */
void tiny_site_remove(const char *path);

/* An adapter that changes the answers, one reference; version ≥ 1 chooses it. */
struct served_adapter *tiny_adapter(const struct tiny_site *t, uint32_t version);

#endif
