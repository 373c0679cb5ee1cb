#include "model/formats/hf_rope.h"

#include <math.h>
#include <string.h>

/* One kind of layer's positions. */
struct rope {
    double base;
    double partial; /* the rotated part of a head, of 1 */
    double scale;   /* linear scaling's factor */
    bool llama3;
    double factor, low, high; /* llama 3's */
    int32_t original;
};

/* How the file stands for the type: rope_type, or type before it. */
static int read_type(const struct json_fields *f, const char **ret_type)
{
    const char *type = "default", *old = NULL;
    int rc = json_fields_string(f, "type", &old);
    type = old ? old : type;
    if (rc == 0)
        rc = json_fields_string(f, "rope_type", &type);
    if (rc == 0 && old && strcmp(old, type) != 0)
        rc = json_fields_fail(f, "type", "and rope_type are not the same");
    *ret_type = type;
    return rc;
}

/* A field that this code does not know may change the frequencies. */
static int refuse_unknown(const struct json_fields *f, bool scaled, bool llama3)
{
    static const char *const always[] = {"type", "rope_type", "rope_theta", "partial_rotary_factor"};
    static const char *const of_llama3[] = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"};
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)f->object, name, value)
    {
        bool known = json_is_null(value) || (scaled && strcmp(name, "factor") == 0);
        for (size_t i = 0; i < ARRAY_LEN(always); i++)
            known |= strcmp(name, always[i]) == 0;
        for (size_t i = 0; llama3 && i < ARRAY_LEN(of_llama3); i++)
            known |= strcmp(name, of_llama3[i]) == 0;
        if (!known)
            return error_set(f->err, ERR_INTEGRITY, "%s: %s holds a field that is not supported with this rope_type",
                             f->file, f->prefix);
    }
    return 0;
}

static int read_llama3(const struct json_fields *f, struct rope *r)
{
    static const char *const needed[] = {"factor", "low_freq_factor", "high_freq_factor"};
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(needed); i++)
        rc = json_fields_require(f, needed[i]);
    if (rc == 0)
        rc = json_fields_number(f, "factor", 1, 1e6, &r->factor);
    if (rc == 0)
        rc = json_fields_number(f, "low_freq_factor", 1e-6, 1e6, &r->low);
    if (rc == 0)
        rc = json_fields_number(f, "high_freq_factor", 1e-6, 1e6, &r->high);
    if (rc == 0)
        rc = json_fields_int(f, "original_max_position_embeddings", 1, MODEL_CONTEXT_MAX, &r->original);
    if (rc == 0 && !(r->high > r->low))
        rc = json_fields_fail(f, "high_freq_factor", "is not above low_freq_factor");
    r->llama3 = true;
    return rc;
}

/* An object of rotary fields; *r holds the defaults. */
static int read_object(const struct json_fields *f, struct rope *r)
{
    const char *type = "";
    int rc;
    if (!json_is_object(f->object))
        return error_set(f->err, ERR_INTEGRITY, "%s: %.*s is no object", f->file, (int)strlen(f->prefix) - 1,
                         f->prefix);
    rc = read_type(f, &type);
    if (rc < 0)
        return rc;
    const bool linear = strcmp(type, "linear") == 0, llama3 = strcmp(type, "llama3") == 0;
    if (!linear && !llama3 && strcmp(type, "default") != 0)
        return json_fields_fail(f, "rope_type", "is a kind that is not supported (default, linear and llama3 are)");
    rc = refuse_unknown(f, linear || llama3, llama3);
    if (rc == 0)
        rc = json_fields_number(f, "rope_theta", 1, 1e9, &r->base);
    if (rc == 0)
        rc = json_fields_number(f, "partial_rotary_factor", 0, 1, &r->partial);
    if (rc == 0 && linear && (rc = json_fields_require(f, "factor")) == 0)
        rc = json_fields_number(f, "factor", 1, 1e6, &r->scale);
    if (rc == 0 && llama3)
        rc = read_llama3(f, r);
    return rc;
}

/* {"full_attention": {...}, "sliding_attention": {...}}: gemma3 since transformers 5. */
static int read_two(const struct json_fields *f, const json_t *both, struct rope *full, struct rope *sliding)
{
    const char *name;
    json_t *value;
    int rc = 0;
    json_object_foreach((json_t *)(uintptr_t)both, name, value)
    {
        const bool is_full = strcmp(name, "full_attention") == 0;
        struct json_fields part = {
            value, f->file, is_full ? "rope_parameters.full_attention." : "rope_parameters.sliding_attention.", f->err};
        if (!is_full && strcmp(name, "sliding_attention") != 0)
            return json_fields_fail(f, "rope_parameters",
                                    "holds something else than full_attention and sliding_attention");
        if (rc == 0 && !json_is_null(value))
            rc = read_object(&part, is_full ? full : sliding);
    }
    if (rc == 0 && (sliding->scale != 1 || sliding->llama3 || sliding->partial != 1))
        rc = json_fields_fail(f, "rope_parameters.sliding_attention", "is scaled, which is not supported");
    return rc;
}

static int read_forms(const struct json_fields *f, bool gemma, struct rope *full, struct rope *sliding)
{
    const bool is_new = json_fields_has(f, "rope_parameters"), old = json_fields_has(f, "rope_scaling");
    const char *name = is_new ? "rope_parameters" : "rope_scaling";
    int rc = json_fields_number(f, "rope_theta", 1, 1e9, &full->base);
    if (rc == 0)
        rc = json_fields_number(f, "partial_rotary_factor", 0, 1, &full->partial);
    if (rc == 0 && gemma)
        rc = json_fields_number(f, "rope_local_base_freq", 1, 1e9, &sliding->base);
    if (rc < 0 || (!is_new && !old))
        return rc;
    if (is_new && old)
        return json_fields_fail(f, "rope_parameters", "and rope_scaling are both there; which one holds?");
    const json_t *object = json_object_get(f->object, name);
    if (is_new && gemma)
        return read_two(f, object, full, sliding);
    return read_object(&(struct json_fields){object, f->file, is_new ? "rope_parameters." : "rope_scaling.", f->err},
                       full);
}

/* Llama 3.1's scaling as divisors of the frequencies: 1 for short waves, factor for long ones, and between them a mean
 * weighted by how often the wave goes into the original context. */
static void llama3_factors(const struct rope *r, int32_t rotated, struct hf_config *config)
{
    for (int32_t i = 0; i < rotated / 2; i++) {
        const double turns = r->original * pow(r->base, -2.0 * i / rotated) / (2 * 3.14159265358979323846);
        const double weight = (turns - r->low) / (r->high - r->low);
        double divisor = 1 / ((1 - weight) / r->factor + weight);
        if (turns > r->high)
            divisor = 1;
        if (turns < r->low)
            divisor = r->factor;
        config->factors[i] = (float)divisor;
    }
    config->factor_count = rotated / 2;
}

int hf_rope_read(const struct json_fields *f, struct hf_config *config)
{
    struct model_config *c = &config->model;
    const bool gemma = c->architecture == MODEL_GEMMA3, glm = c->architecture == MODEL_GLM4;
    struct rope full = {.base = gemma ? 1e6 : 1e4, .partial = glm ? 0.5 : 1, .scale = 1, .original = c->context_length};
    struct rope sliding = {.base = 1e4, .partial = 1, .scale = 1};
    int rc = read_forms(f, gemma, &full, &sliding);
    if (rc < 0)
        return rc;
    c->rope_order = glm ? ROPE_NORM : ROPE_NEOX; /* transformers rotates halves, glm4 alone neighbours */
    c->rope_base = full.base;
    c->rope_scale = full.scale;
    c->rope_base_sliding = gemma && c->window > 0 ? sliding.base : 0;
    c->rotated = (int32_t)(c->head_size * full.partial);
    if (!glm && full.partial != 1)
        return json_fields_fail(f, "partial_rotary_factor", "is not 1, which is supported for glm4 only");
    if (c->rotated < 2 || c->rotated % 2 != 0)
        return json_fields_fail(f, "partial_rotary_factor", "leaves no even number of values to rotate in a head");
    if (full.llama3 && gemma)
        return json_fields_fail(f, "rope_type", "llama3 is not supported for gemma3");
    if (full.llama3)
        llama3_factors(&full, c->rotated, config);
    return 0;
}
