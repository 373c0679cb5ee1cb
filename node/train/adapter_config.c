#include "node/train/adapter_config.h"

#include "base/hex.h"
#include "crypto/hash.h"
#include "crypto/random.h"

#define TEXT_BYTES_MAX 512

/* The value of "key=value" at *cursor, NUL-terminated in place; NULL if the next key is another one. */
static char *field(char **cursor, const char *key)
{
    size_t n = strlen(key);
    char *value, *end;

    if (!*cursor || strncmp(*cursor, key, n) != 0 || (*cursor)[n] != '=')
        return NULL;
    value = *cursor + n + 1;
    end = strchr(value, ';');
    if (end)
        *end = 0;
    *cursor = end ? end + 1 : NULL;
    return value;
}

static bool whole_number(const char *text, char end, int32_t max, int32_t *ret, const char **ret_rest)
{
    char *stop;
    long v;

    if (*text < '0' || *text > '9')
        return false;
    v = strtol(text, &stop, 10);
    if (*stop != end || v > max)
        return false;
    *ret = (int32_t)v;
    if (ret_rest)
        *ret_rest = stop + 1;
    return true;
}

static bool parse_layers(const char *text, struct lora_config *lora)
{
    int32_t first, last;
    const char *rest;

    if (!whole_number(text, '-', MODEL_LAYERS_MAX - 1, &first, &rest) ||
        !whole_number(rest, 0, MODEL_LAYERS_MAX - 1, &last, NULL) || last < first)
        return false;
    lora->layer_first = first;
    lora->layer_count = last - first + 1;
    return true;
}

static bool parse_targets(char *text, struct lora_config *lora)
{
    enum lora_target target;
    char *save = NULL;

    for (char *name = strtok_r(text, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
        if (!lora_target_parse(name, &target) || (lora->targets & LORA_TARGET_BIT(target)))
            return false;
        lora->targets |= LORA_TARGET_BIT(target);
    }
    return lora->targets != 0;
}

static bool parse_alpha(const char *text, double *ret_alpha)
{
    char *stop;
    double v = strtod(text, &stop);

    if (stop == text || *stop || !(v > 0 && v <= 65536))
        return false;
    *ret_alpha = v;
    return true;
}

int adapter_config_parse(struct span text, struct adapter_config *ret_config, struct error *err)
{
    static const char *const keys[] = {"layers", "targets", "rank", "alpha", "scaling", "mode", "seed"};
    struct adapter_config config = {0};
    char copy[TEXT_BYTES_MAX], *cursor = copy;

    if (text.len >= sizeof copy || memchr(text.ptr, 0, text.len))
        return error_set(err, ERR_CONFIG, "LoRA configuration: %zu bytes, expected text of less than %d", text.len,
                         TEXT_BYTES_MAX);
    memcpy(copy, text.ptr, text.len);
    copy[text.len] = 0;
    for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
        char *value = field(&cursor, keys[i]);
        bool ok = value != NULL;
        if (!ok)
            return error_set(err, ERR_CONFIG, "LoRA configuration: expected %s= as its field %zu", keys[i], i + 1);
        switch (i) {
        case 0:
            ok = parse_layers(value, &config.lora);
            break;
        case 1:
            ok = parse_targets(value, &config.lora);
            break;
        case 2:
            ok = whole_number(value, 0, LORA_RANK_MAX, &config.lora.rank, NULL);
            break;
        case 3:
            ok = parse_alpha(value, &config.lora.alpha);
            break;
        case 4:
            config.lora.scaling = strcmp(value, "rank") == 0 ? LORA_SCALE_RANK : LORA_SCALE_SQRT_RANK;
            ok = config.lora.scaling == LORA_SCALE_RANK || strcmp(value, "sqrt-rank") == 0;
            break;
        case 5:
            config.alternating = strcmp(value, "alternating") == 0;
            config.lora.mode = config.alternating || strcmp(value, "ffa") == 0 ? LORA_FFA : LORA_JOINT;
            ok = config.lora.mode == LORA_FFA || strcmp(value, "joint") == 0;
            break;
        default:
            ok = hex_decode(value, config.seed, sizeof config.seed) == 0;
        }
        if (!ok)
            return error_set(err, ERR_CONFIG, "LoRA configuration: the value of %s is out of range or malformed",
                             keys[i]);
    }
    if (cursor)
        return error_set(err, ERR_CONFIG, "LoRA configuration: text after its last field, seed");
    *ret_config = config;
    return 0;
}

struct seed_streams {
    const uint8_t *seed;
    struct random_stream stream;
};

static struct rng stream_of_tensor(void *ctx, uint32_t layer, enum lora_target target)
{
    struct seed_streams *s = ctx;
    uint8_t key[HASH_SIZE];
    struct hash h;

    hash_begin(&h, "consilium/ffa/v1");
    hash_part(&h, span_of(s->seed, ADAPTER_SEED_BYTES));
    hash_part_u64(&h, layer);
    hash_part_u64(&h, (uint64_t)target);
    hash_end(&h, key);
    random_stream_init(&s->stream, key, "ffa");
    return random_stream_rng(&s->stream);
}

int adapter_config_build(const struct adapter_config *config, const struct model_config *model, struct lora *ret_lora,
                         struct error *err)
{
    struct seed_streams streams = {.seed = config->seed};
    int rc = lora_init(ret_lora, &config->lora, model, err);

    if (rc < 0)
        return rc;
    lora_fill_a(ret_lora, stream_of_tensor, &streams);
    return 0;
}

size_t adapter_config_words(const struct adapter_config *config, const struct lora *lora)
{
    return config->alternating ? lora->trained_count + lora->frozen_count : lora->trained_count;
}

size_t adapter_config_split(const struct adapter_config *config, const struct lora *lora)
{
    if (!config->alternating)
        return 0;
    return lora->config.mode == LORA_FFA ? lora->frozen_count : lora->trained_count;
}

int adapter_config_check_plan(const struct adapter_config *config, const struct lora *lora, uint64_t split_words,
                              struct error *err)
{
    const size_t split = adapter_config_split(config, lora);

    if (lora->config.mode == LORA_JOINT)
        return error_set(err, ERR_POLICY,
                         "the plan trains A and B together: averaging the two is not averaging their product, the "
                         "update (ffa and alternating train one at a time)");
    if (split != split_words)
        return error_set(err, ERR_POLICY,
                         "the plan cuts the adapter after %llu values, its LoRA configuration after %zu",
                         (unsigned long long)split_words, split);
    return 0;
}

int adapter_config_apply(const struct adapter_config *config, const float *state, size_t words, struct lora *lora,
                         struct error *err)
{
    struct seed_streams streams = {.seed = config->seed};
    const size_t expected = adapter_config_words(config, lora), split = adapter_config_split(config, lora);
    const bool train_a = lora->config.mode == LORA_FFB;
    float *a = train_a ? lora->trained : lora->frozen, *b = train_a ? lora->frozen : lora->trained;

    if (lora->config.mode == LORA_JOINT)
        return error_set(err, ERR_INTEGRITY, "an adapter of a federation has its factors trained together");
    if (words != expected)
        return error_set(err, ERR_INTEGRITY, "the adapter has %zu parameters, its LoRA configuration needs %zu", words,
                         expected);
    lora_fill_a(lora, stream_of_tensor, &streams);
    for (size_t i = 0; i < split; i++)
        a[i] += state[i];
    memcpy(b, state + split, (words - split) * sizeof *b);
    return 0;
}

int adapter_config_load(const struct adapter_config *config, const struct model_config *model, const float *state,
                        size_t words, struct lora *ret_lora, struct error *err)
{
    struct lora lora;
    int rc = lora_init(&lora, &config->lora, model, err);

    if (rc < 0)
        return rc;
    if ((rc = adapter_config_apply(config, state, words, &lora, err)) < 0) {
        lora_release(&lora);
        return rc;
    }
    *ret_lora = lora;
    return 0;
}

void adapter_config_turn(const struct adapter_config *config, uint64_t segment_offset, struct lora *lora)
{
    const enum lora_mode wanted = segment_offset == 0 ? LORA_FFB : LORA_FFA;

    if (config->alternating && lora->config.mode != wanted)
        lora_exchange(lora);
}
