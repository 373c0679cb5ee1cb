/* Writes the tiny random llama of tests/node/tiny_site.h as a GGUF file: make_tiny_model FILE, run in the source
 * folder. */
#include "tests/node/tiny_site.h"

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s FILE\n", argv[0]);
        return 2;
    }
    tiny_site_write_model(argv[1]);
    return 0;
}
