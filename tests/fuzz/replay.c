/*
 * Gives a fuzz target every file of a folder, once. For builds without libFuzzer.
 *
 *     fuzz_gguf tests/fuzz/corpus/gguf
 */
#include "tests/fuzz/fuzz.h"

#include <dirent.h>
#include <string.h>

#define INPUT_BYTES_MAX (1u << 20)

/* In a block of its exact size, so that a sanitizer sees a read past it. */
static void replay(const char *path)
{
    FILE *in = fopen(path, "rb");
    uint8_t *bytes = malloc(INPUT_BYTES_MAX), *exact;
    FUZZ_NEED(in && bytes);
    size_t size = fread(bytes, 1, INPUT_BYTES_MAX, in);
    FUZZ_NEED(size < INPUT_BYTES_MAX && !ferror(in));
    exact = malloc(size ? size : 1);
    FUZZ_NEED(exact);
    memcpy(exact, bytes, size);
    fclose(in);
    free(bytes);
    fprintf(stderr, "%s\n", path); /* the last line before a crash says which */
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
}

int main(int argc, char **argv)
{
    char path[4096];
    struct dirent *entry;
    int count = 0;
    DIR *folder = argc == 2 ? opendir(argv[1]) : NULL;
    if (!folder) {
        fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
        return 2;
    }
    while ((entry = readdir(folder))) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s/%s", argv[1], entry->d_name);
        replay(path);
        count++;
    }
    closedir(folder);
    printf("%d files\n", count);
    return count > 0 ? 0 : 1; /* a folder without files tests nothing */
}
