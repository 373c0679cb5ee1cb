#include "model/formats/model_file.h"

#include "base/file.h"
#include "model/formats/hf_model.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define PATH_BYTES 4096

/* The parts of a folder that have a place of their own; the shards follow. */
enum { PART_CONFIG, PART_TOKENIZER, PART_TOKENIZER_CONFIG, PART_CHAT_TEMPLATE, PART_WEIGHTS };
static const char *const fixed_parts[PART_WEIGHTS] = {"config.json", "tokenizer.json", "tokenizer_config.json",
                                                      "chat_template.jinja"};
#define SINGLE_NAME "model.safetensors"
#define INDEX_NAME "model.safetensors.index.json"

struct model_file {
    char name[256];
    struct gguf *gguf; /* either this */
    struct model gguf_model;
    struct hf_model *hf; /* or this, with its folder's path */
    char folder[PATH_BYTES];
    struct hf_index *index;               /* owns the shards' names; NULL: one file */
    struct span fixed[PART_WEIGHTS];      /* maps; empty: absent */
    struct hf_file shards[HF_SHARDS_MAX]; /* (shard_count) maps */
    size_t shard_count;
};

/* Maps a file of the folder. *ret_map stays empty if it is absent and not required. */
static int map_part(const struct model_file *f, const char *name, size_t bytes_max, bool required, struct span *ret_map,
                    struct error *err)
{
    char path[PATH_BYTES + 256];
    struct stat info;
    file_join(path, sizeof path, f->folder, name);
    if (lstat(path, &info) < 0) {
        if (!required && errno == ENOENT)
            return 0;
        return error_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_RESOURCES, "%s: cannot open: %s", path,
                         strerror(errno));
    }
    if (S_ISLNK(info.st_mode))
        return error_set(err, ERR_CONFIG,
                         "%s is a symbolic link; a model's folder must hold the files themselves (cp -rL copies them)",
                         path);
    if (!S_ISREG(info.st_mode))
        return error_set(err, ERR_CONFIG, "%s: not a file", path);
    if ((uint64_t)info.st_size > bytes_max)
        return error_set(err, ERR_INTEGRITY, "%s: %lld bytes, at most %zu are allowed", path, (long long)info.st_size,
                         bytes_max);
    return file_map(path, ret_map, err);
}

static int map_shards(struct model_file *f, struct error *err)
{
    struct span index = {NULL, 0};
    /* As in transformers, a single file of weights goes before an index. */
    char single[PATH_BYTES + 256];
    file_join(single, sizeof single, f->folder, SINGLE_NAME);
    int rc = file_exists(single) ? 0 : map_part(f, INDEX_NAME, HF_INDEX_BYTES_MAX, false, &index, err);
    if (rc == 0 && index.ptr)
        rc = hf_index_parse(index, INDEX_NAME, &f->index, err);
    file_unmap(index);
    const size_t count = f->index ? hf_index_shard_count(f->index) : 1;
    for (size_t i = 0; rc == 0 && i < count; i++) {
        struct hf_file *shard = &f->shards[i];
        shard->name = f->index ? hf_index_shard(f->index, i) : SINGLE_NAME;
        rc = map_part(f, shard->name, SIZE_MAX, true, &shard->bytes, err);
        f->shard_count = i + 1;
    }
    return rc;
}

static int open_folder(struct model_file *f, const char *path, struct error *err)
{
    static const size_t bytes_max[PART_WEIGHTS] = {(size_t)1 << 20, TOKENIZER_JSON_BYTES_MAX,
                                                   TOKENIZER_CONFIG_BYTES_MAX, TOKENIZER_CONFIG_BYTES_MAX};
    int rc = 0;
    if (strlen(path) >= sizeof f->folder)
        return error_set(err, ERR_CONFIG, "the model's path is too long");
    snprintf(f->folder, sizeof f->folder, "%s", path);
    for (int i = 0; rc == 0 && i < PART_WEIGHTS; i++)
        rc = map_part(f, fixed_parts[i], bytes_max[i], i == PART_CONFIG, &f->fixed[i], err);
    if (rc == 0)
        rc = map_shards(f, err);
    return rc < 0 ? rc : hf_model_parse(f->name, f->fixed[PART_CONFIG], f->index, f->shards, &f->hf, err);
}

/* The last component of a path, slashes at its end left out. */
static void base_name(const char *path, char *out, size_t size)
{
    size_t end = strlen(path), begin;
    while (end > 1 && path[end - 1] == '/')
        end--;
    for (begin = end; begin > 0 && path[begin - 1] != '/'; begin--)
        ;
    snprintf(out, size, "%.*s", (int)(end - begin), path + begin);
}

int model_file_open(const char *path, struct model_file **ret_file, struct error *err)
{
    struct model_file *f = calloc(1, sizeof *f);
    struct stat info;
    int rc;
    if (!f)
        return error_set(err, ERR_RESOURCES, "no memory to open the model");
    base_name(path, f->name, sizeof f->name);
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode))
        rc = open_folder(f, path, err);
    else if ((rc = gguf_open(path, &f->gguf, err)) == 0)
        rc = gguf_load_model(f->gguf, &f->gguf_model, err);
    if (rc < 0)
        model_file_close(f);
    else
        *ret_file = f;
    return rc;
}

void model_file_close(struct model_file *file)
{
    if (!file)
        return;
    hf_model_free(file->hf);
    for (size_t i = 0; i < file->shard_count; i++)
        file_unmap(file->shards[i].bytes);
    for (int i = 0; i < PART_WEIGHTS; i++)
        file_unmap(file->fixed[i]);
    hf_index_free(file->index);
    gguf_close(file->gguf);
    free(file);
}

const char *model_file_name(const struct model_file *file)
{
    return file->name;
}

bool model_file_is_folder(const struct model_file *file)
{
    return file->hf != NULL;
}

const struct model *model_file_model(const struct model_file *file)
{
    return file->hf ? hf_model_get(file->hf) : &file->gguf_model;
}

int model_file_tokenizer(const struct model_file *file, struct tokenizer **ret_tokenizer, struct error *err)
{
    const int32_t rows = model_file_model(file)->config.vocabulary;
    struct tokenizer *tokenizer = NULL;
    int rc;
    if (file->hf && !file->fixed[PART_TOKENIZER].ptr)
        return error_set(err, ERR_NOT_FOUND, "%s: tokenizer.json is missing", file->name);
    const struct tokenizer_files files = {file->fixed[PART_TOKENIZER], file->fixed[PART_TOKENIZER_CONFIG],
                                          file->fixed[PART_CHAT_TEMPLATE]};
    if (file->hf)
        rc = tokenizer_from_json(&files, file->name, &tokenizer, err);
    else
        rc = tokenizer_new(file->gguf, &tokenizer, err);
    if (rc == 0 && tokenizer_vocabulary(tokenizer) > rows) {
        rc = error_set(err, ERR_INTEGRITY, "%s: tokenizer.json has ids up to %d, but the embedding has %d rows",
                       file->name, tokenizer_vocabulary(tokenizer) - 1, rows);
        tokenizer_free(tokenizer);
    }
    if (rc == 0)
        *ret_tokenizer = tokenizer;
    return rc;
}

static size_t fixed_count(const struct model_file *file)
{
    size_t count = 0;
    for (int i = 0; i < PART_WEIGHTS; i++)
        count += file->fixed[i].ptr != NULL;
    return count;
}

size_t model_file_part_count(const struct model_file *file)
{
    return file->hf ? fixed_count(file) + file->shard_count : 1;
}

struct model_file_part model_file_part(const struct model_file *file, size_t i)
{
    assert(i < model_file_part_count(file));
    if (!file->hf)
        return (struct model_file_part){file->name, gguf_bytes(file->gguf)};
    for (int k = 0; k < PART_WEIGHTS; k++)
        if (file->fixed[k].ptr && i-- == 0)
            return (struct model_file_part){fixed_parts[k], file->fixed[k]};
    return (struct model_file_part){file->shards[i].name, file->shards[i].bytes};
}
