#include "node/base_hash.h"

void base_hash(const struct model_file *file, uint8_t out[HASH_SIZE])
{
    uint8_t part_hash[HASH_SIZE];
    struct hash h;

    if (!model_file_is_folder(file)) {
        hash_bytes(model_file_part(file, 0).bytes, out);
        return;
    }
    hash_begin(&h, "consilium/base-folder/v1");
    for (size_t i = 0; i < model_file_part_count(file); i++) {
        const struct model_file_part part = model_file_part(file, i);
        hash_bytes(part.bytes, part_hash);
        hash_part(&h, span_str(part.name));
        hash_part_u64(&h, part.bytes.len);
        hash_part(&h, span_of(part_hash, HASH_SIZE));
    }
    hash_end(&h, out);
}

int base_hash_path(const char *path, uint8_t ret_hash[HASH_SIZE], struct error *err)
{
    struct model_file *file = NULL;
    int rc = model_file_open(path, &file, err);

    if (rc == 0)
        base_hash(file, ret_hash);
    model_file_close(file);
    return rc;
}
