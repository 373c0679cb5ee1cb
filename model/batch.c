#include "model/batch.h"

#include "base/checked.h"

#include <stdlib.h>
#include <string.h>

int batch_init(struct batch *batch, int32_t tokens_max, int32_t examples_max, struct error *err)
{
    if (tokens_max < 1 || examples_max < 1 || examples_max > tokens_max)
        return error_set(err, ERR_CONFIG, "batch: limits of %d tokens and %d examples make no sense", tokens_max,
                         examples_max);
    size_t tokens = (size_t)tokens_max, examples = (size_t)examples_max + 1;
    int32_t *memory = calloc(5 * tokens + 2 * examples, sizeof *memory);
    if (!memory)
        return error_set(err, ERR_RESOURCES, "batch: no memory for %d tokens", tokens_max);
    *batch = (struct batch){
        .tokens_max = tokens_max,
        .examples_max = examples_max,
        .ids = memory,
        .positions = memory + tokens,
        .label_rows = memory + 2 * tokens,
        .label_targets = memory + 3 * tokens,
        .label_weights = (float *)(memory + 4 * tokens),
        .offsets = memory + 5 * tokens,
        .label_offsets = memory + 5 * tokens + examples,
        .memory = memory,
    };
    return 0;
}

void batch_release(struct batch *batch)
{
    if (!batch)
        return;
    free(batch->memory);
    memset(batch, 0, sizeof *batch);
}

void batch_clear(struct batch *batch)
{
    batch->tokens = batch->examples = batch->labels = 0;
    batch->offsets[0] = batch->label_offsets[0] = 0;
}

bool batch_add(struct batch *batch, const struct batch_example *example)
{
    assert(example->length >= 1);
    if (batch->examples == batch->examples_max || example->length > batch->tokens_max - batch->tokens)
        return false;
    const int32_t first = batch->tokens, first_label = batch->labels;
    for (int32_t i = 0; i < example->length; i++) {
        batch->ids[first + i] = example->ids[i];
        batch->positions[first + i] = i;
        if (i > 0 && example->learn[i]) {
            batch->label_rows[batch->labels] = first + i - 1;
            batch->label_targets[batch->labels++] = example->ids[i];
        }
    }
    for (int32_t i = first_label; i < batch->labels; i++)
        batch->label_weights[i] = 1.0f / (float)(batch->labels - first_label);
    batch->tokens += example->length;
    batch->examples++;
    batch->offsets[batch->examples] = batch->tokens;
    batch->label_offsets[batch->examples] = batch->labels;
    return true;
}
