/* Writes the tiny random llama of tests/node/tiny_site.h: make_tiny_model FILE as a GGUF file, make_tiny_model --folder
 * FOLDER as a Hugging Face folder. Run in the source folder. */
#include "tests/node/tiny_site.h"

int main(int argc, char **argv)
{
    const bool folder = argc == 3 && strcmp(argv[1], "--folder") == 0;
    if (argc != 2 && !folder) {
        fprintf(stderr, "usage: %s [--folder] PATH\n", argv[0]);
        return 2;
    }
    if (folder)
        tiny_site_write_folder(argv[2], TENSOR_F32);
    else
        tiny_site_write_model(argv[1], TENSOR_F32);
    return 0;
}
