/*
 * A tokenizer's description from a Hugging Face tokenizer.json (format: the `tokenizers` package's serialisation).
 *
 * What does not change the ids of a text without special tokens is passed over: post_processor, decoder, truncation,
 * padding. Everything else must be as one of the known tokenizers has it, or is refused.
 */
#include "model/formats/json_fields.h"
#include "model/formats/tokenizer_build.h"

struct json_reading {
    const char *name;
    json_t *root, *config; /* owned; config may be NULL */
    struct tokenizer_source source;
    struct span *texts; /* owned, as the rest */
    uint8_t *kinds;
    struct merge_text *merges;
    struct error *err;
};

/* ---- parsing within bounds ---- */

static int parse(const struct json_reading *r, const char *file, struct span text, size_t max, size_t flags,
                 json_t **ret_root)
{
    json_error_t problem;
    if (text.len > max)
        return error_set(r->err, ERR_RESOURCES, "%s: %s has %zu bytes, at most %zu are allowed", r->name, file,
                         text.len, max);
    const size_t marks = json_fields_count(text);
    if (marks > TOKENIZER_JSON_VALUES_MAX)
        return error_set(r->err, ERR_RESOURCES, "%s: %s holds about %zu values, at most %u are allowed", r->name, file,
                         marks, TOKENIZER_JSON_VALUES_MAX);
    json_t *root =
        json_loadb((const char *)text.ptr, text.len, flags | JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &problem);
    if (!root)
        return error_set(r->err, ERR_INTEGRITY, "%s: %s is not valid JSON: line %d: %s", r->name, file, problem.line,
                         problem.text);
    if (!json_is_object(root)) {
        json_decref(root);
        return error_set(r->err, ERR_INTEGRITY, "%s: %s is no JSON object", r->name, file);
    }
    *ret_root = root;
    return 0;
}

static int fail(const struct json_reading *r, const char *field, const char *expected)
{
    return error_set(r->err, ERR_INTEGRITY, "%s: tokenizer.json: %s is not %s", r->name, field, expected);
}

static struct span text_of(const json_t *value)
{
    return json_is_string(value) ? span_of(json_string_value(value), json_string_length(value)) : (struct span){0};
}

static bool is_text(const json_t *value, const char *text)
{
    return json_is_string(value) && span_equal(text_of(value), span_str(text));
}

/* True for the value `wanted`, and for an absent or null one if that means the same. */
static bool is_flag(const json_t *object, const char *key, bool wanted, bool otherwise)
{
    const json_t *value = json_object_get(object, key);
    if (!value || json_is_null(value))
        return otherwise == wanted;
    return json_is_boolean(value) && json_is_true(value) == wanted;
}

/* An option that is not supported: the message shows it. */
static int refuse(const struct json_reading *r, const char *field, const json_t *value)
{
    char *shown = value ? json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    int rc = error_set(r->err, ERR_CONFIG, "%s: tokenizer.json: %s is not supported: %.400s", r->name, field,
                       shown ? shown : "(absent)");
    free(shown);
    return rc;
}

/* ---- how a text is cut ---- */

static bool is_type(const json_t *value, const char *type)
{
    return json_is_object(value) && is_text(json_object_get(value, "type"), type);
}

static bool is_byte_level(const json_t *value, bool with_pattern)
{
    return is_type(value, "ByteLevel") && is_flag(value, "add_prefix_space", false, true) &&
           is_flag(value, "use_regex", with_pattern, true);
}

/* Digits and ByteLevel, or a Split with a known pattern and ByteLevel. */
static bool read_sequence(const json_t *steps, enum pretokenizer *ret_pretokenizer)
{
    const json_t *first = json_array_get(steps, 0), *second = json_array_get(steps, 1);
    if (json_array_size(steps) != 2)
        return false;
    if (is_type(first, "Digits") && is_flag(first, "individual_digits", true, false) && is_byte_level(second, true)) {
        *ret_pretokenizer = PRETOKENIZE_SMOLLM;
        return true;
    }
    return is_type(first, "Split") && is_text(json_object_get(first, "behavior"), "Isolated") &&
           is_flag(first, "invert", false, false) && is_byte_level(second, false) &&
           pretokenizer_of_pattern(text_of(json_object_get(json_object_get(first, "pattern"), "Regex")),
                                   ret_pretokenizer);
}

/* Gemma's: the normalizer has left no space that it could split at. */
static bool splits_at_spaces(const json_t *value)
{
    return is_type(value, "Split") && is_text(json_object_get(json_object_get(value, "pattern"), "String"), " ") &&
           is_text(json_object_get(value, "behavior"), "MergedWithPrevious") && is_flag(value, "invert", false, false);
}

static bool replaces_spaces(const json_t *value)
{
    return is_type(value, "Replace") && is_text(json_object_get(json_object_get(value, "pattern"), "String"), " ") &&
           is_text(json_object_get(value, "content"), "\xe2\x96\x81");
}

static bool is_nothing(const json_t *value, const char *list)
{
    return !value || json_is_null(value) ||
           (is_type(value, "Sequence") && json_is_array(json_object_get(value, list)) &&
            json_array_size(json_object_get(value, list)) == 0);
}

static int read_pipeline(struct json_reading *r)
{
    const json_t *normalizer = json_object_get(r->root, "normalizer");
    const json_t *cutter = json_object_get(r->root, "pre_tokenizer");
    struct tokenizer_source *s = &r->source;
    if (replaces_spaces(normalizer)) {
        s->vocabulary.characters = true;
        if (!is_nothing(cutter, "pretokenizers") && !splits_at_spaces(cutter))
            return refuse(r, "pre_tokenizer", cutter);
        return 0;
    }
    s->nfc = is_type(normalizer, "NFC");
    if (!s->nfc && !is_nothing(normalizer, "normalizers"))
        return refuse(r, "normalizer", normalizer);
    if (!is_type(cutter, "Sequence") || !read_sequence(json_object_get(cutter, "pretokenizers"), &s->pretokenizer))
        return refuse(r, "pre_tokenizer", cutter);
    return 0;
}

static bool is_empty(const json_t *value)
{
    return !value || json_is_null(value) || is_text(value, "");
}

static int read_options(struct json_reading *r, const json_t *model)
{
    static const char *const unused[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix"};
    if (!is_type(model, "BPE")) /* the oldest files leave the type out: not these models' */
        return refuse(r, "model.type", json_object_get(model, "type"));
    for (size_t i = 0; i < ARRAY_LEN(unused); i++)
        if (!is_empty(json_object_get(model, unused[i])))
            return refuse(r, unused[i], json_object_get(model, unused[i]));
    if (!is_flag(model, "byte_fallback", r->source.vocabulary.characters, false))
        return refuse(r, "model.byte_fallback", json_object_get(model, "byte_fallback"));
    if (!is_flag(model, "ignore_merges", true, false) && !is_flag(model, "ignore_merges", false, false))
        return fail(r, "model.ignore_merges", "true or false");
    r->source.whole_words = is_flag(model, "ignore_merges", true, false);
    return 0;
}

/* ---- tokens ---- */

static int read_id(const struct json_reading *r, const char *field, const json_t *value, int32_t *ret_id)
{
    const json_int_t id = json_integer_value(value);
    if (!json_is_integer(value) || id < 0 || id >= MODEL_VOCABULARY_MAX)
        return error_set(r->err, ERR_INTEGRITY, "%s: tokenizer.json: %s has an id that is not 0 to %d", r->name, field,
                         MODEL_VOCABULARY_MAX - 1);
    *ret_id = (int32_t)id;
    return 0;
}

/* The number of ids, which is one more than the largest. */
static int count_ids(struct json_reading *r, json_t *vocab, const json_t *added)
{
    const char *key;
    json_t *value;
    size_t i;
    int32_t id = -1, last = -1;
    int rc;
    json_object_foreach(vocab, key, value)
    {
        if ((rc = read_id(r, "model.vocab", value, &id)) < 0)
            return rc;
        last = id > last ? id : last;
    }
    json_array_foreach(added, i, value)
    {
        if ((rc = read_id(r, "added_tokens", json_object_get(value, "id"), &id)) < 0)
            return rc;
        last = id > last ? id : last;
    }
    if (last < 0)
        return fail(r, "model.vocab", "a vocabulary: it is empty");
    r->source.vocabulary.count = last + 1;
    return 0;
}

static int place_tokens(struct json_reading *r, json_t *vocab)
{
    const char *key;
    json_t *value;
    json_object_foreach(vocab, key, value)
    {
        const json_int_t id = json_integer_value(value);
        const struct span text = span_str(key);
        if (r->kinds[id] != TOKEN_UNUSED)
            return error_set(r->err, ERR_INTEGRITY, "%s: tokenizer.json: model.vocab: id %d stands for two tokens",
                             r->name, (int)id);
        r->texts[id] = text;
        r->kinds[id] = r->source.vocabulary.characters && vocabulary_byte(text) >= 0 ? TOKEN_BYTE : TOKEN_NORMAL;
    }
    return 0;
}

/* A special token becomes control, another one user-defined. Those that may stand in the vocabulary, too. */
static int place_added(struct json_reading *r, const json_t *vocab, const json_t *added)
{
    static const char *const matching[] = {"single_word", "lstrip", "rstrip"};
    size_t i;
    json_t *value;
    json_array_foreach(added, i, value)
    {
        const json_t *content = json_object_get(value, "content");
        const json_int_t id = json_integer_value(json_object_get(value, "id"));
        const bool special = is_flag(value, "special", true, false);
        const struct span text = text_of(content);
        const json_t *known = text.len > 0 ? json_object_getn(vocab, (const char *)text.ptr, text.len) : NULL;
        if (text.len == 0)
            return fail(r, "added_tokens[].content", "a text");
        if ((known && json_integer_value(known) != id) || r->kinds[id] == TOKEN_CONTROL ||
            r->kinds[id] == TOKEN_USER_DEFINED || (!known && r->kinds[id] != TOKEN_UNUSED))
            return error_set(r->err, ERR_INTEGRITY,
                             "%s: tokenizer.json: added_tokens: id %d stands for two tokens, or its text has two ids",
                             r->name, (int)id);
        for (size_t k = 0; k < ARRAY_LEN(matching); k++)
            if (!is_flag(value, matching[k], false, false))
                return refuse(r, "an added token that takes what is around it into account", value);
        if (r->source.nfc && !special && !is_flag(value, "normalized", false, true))
            return refuse(r, "an added token that is looked for after normalisation", value);
        r->texts[id] = text;
        r->kinds[id] = special ? TOKEN_CONTROL : TOKEN_USER_DEFINED;
    }
    return 0;
}

static int read_tokens(struct json_reading *r, json_t *vocab)
{
    const json_t *added = json_object_get(r->root, "added_tokens");
    if (!json_is_object(vocab))
        return fail(r, "model.vocab", "an object of texts and ids");
    if (added && !json_is_null(added) && !json_is_array(added))
        return fail(r, "added_tokens", "a list");
    int rc = count_ids(r, vocab, added);
    if (rc < 0)
        return rc;
    r->texts = calloc((size_t)r->source.vocabulary.count, sizeof *r->texts);
    r->kinds = malloc((size_t)r->source.vocabulary.count);
    if (!r->texts || !r->kinds)
        return error_set(r->err, ERR_RESOURCES, "%s: no memory for the vocabulary", r->name);
    memset(r->kinds, TOKEN_UNUSED, (size_t)r->source.vocabulary.count);
    r->source.vocabulary.texts = r->texts;
    r->source.vocabulary.kinds = r->kinds;
    rc = place_tokens(r, vocab);
    return rc < 0 ? rc : place_added(r, vocab, added);
}

/* "left right" or ["left", "right"]. */
static int read_merges(struct json_reading *r, const json_t *merges)
{
    size_t i;
    json_t *value;
    if (!json_is_array(merges))
        return fail(r, "model.merges", "a list");
    r->merges = calloc(json_array_size(merges) + 1, sizeof *r->merges);
    if (!r->merges)
        return error_set(r->err, ERR_RESOURCES, "%s: no memory for the merges", r->name);
    json_array_foreach(merges, i, value)
    {
        if (json_is_string(value))
            r->merges[i] = merge_text_of(text_of(value));
        else if (json_array_size(value) == 2)
            r->merges[i] = (struct merge_text){text_of(json_array_get(value, 0)), text_of(json_array_get(value, 1))};
    }
    r->source.merges = r->merges;
    r->source.merge_count = json_array_size(merges);
    return 0;
}

/* ---- tokenizer_config.json ---- */

/* The id of a token by its text as added_tokens or the vocabulary has it; −1: none. */
static int32_t id_of(const struct json_reading *r, struct span text)
{
    for (int32_t id = 0; id < r->source.vocabulary.count; id++)
        if (r->kinds[id] == TOKEN_CONTROL && span_equal(r->texts[id], text))
            return id;
    for (int32_t id = 0; id < r->source.vocabulary.count; id++)
        if (text.len > 0 && span_equal(r->texts[id], text))
            return id;
    return -1;
}

/* "text" or {"content": "text"}. */
static int read_special(const struct json_reading *r, const char *key, int32_t *ret_id)
{
    const json_t *value = json_object_get(r->config, key);
    if (json_is_object(value))
        value = json_object_get(value, "content");
    *ret_id = -1;
    if (!value || json_is_null(value))
        return 0;
    *ret_id = id_of(r, text_of(value));
    if (*ret_id < 0)
        return error_set(r->err, ERR_INTEGRITY, "%s: tokenizer_config.json: %s names no token of tokenizer.json",
                         r->name, key);
    return 0;
}

/* A text, or a list of named ones of which the one called default counts. */
static struct span read_template(const json_t *value)
{
    size_t i;
    json_t *item;
    if (json_is_string(value))
        return text_of(value);
    json_array_foreach(value, i, item)
    {
        if (is_text(json_object_get(item, "name"), "default"))
            return text_of(json_object_get(item, "template"));
    }
    return (struct span){0};
}

static int read_config(struct json_reading *r)
{
    r->source.eot = -1;
    int rc = read_special(r, "bos_token", &r->source.bos);
    if (rc == 0)
        rc = read_special(r, "eos_token", &r->source.eos);
    if (rc == 0)
        rc = read_special(r, "pad_token", &r->source.pad);
    if (r->source.chat_template.len == 0)
        r->source.chat_template = read_template(json_object_get(r->config, "chat_template"));
    return rc;
}

/* ---- all of it ---- */

static int read_all(struct json_reading *r)
{
    json_t *model = json_object_get(r->root, "model");
    if (!json_is_object(model))
        return fail(r, "model", "an object");
    int rc = read_pipeline(r);
    if (rc == 0)
        rc = read_options(r, model);
    if (rc == 0)
        rc = read_tokens(r, json_object_get(model, "vocab"));
    if (rc == 0)
        rc = read_merges(r, json_object_get(model, "merges"));
    return rc < 0 ? rc : read_config(r);
}

/* What the vocabulary lacks would become the unknown token; here it is left out. So nothing of UTF-8 may be lacking. */
static int check_unknown(const struct json_reading *r, const struct tokenizer *t)
{
    const json_t *unknown = json_object_get(json_object_get(r->root, "model"), "unk_token");
    for (int byte = 0; byte < 256 && !is_empty(unknown); byte++) {
        const bool occurs = byte < 0xc0 || (byte >= 0xc2 && byte <= 0xf4);
        if (occurs && t->vocabulary.by_byte[byte] < 0)
            return refuse(r, "model.unk_token with a vocabulary that lacks bytes", unknown);
    }
    return 0;
}

int tokenizer_from_json(const struct tokenizer_files *files, const char *name, struct tokenizer **ret_tokenizer,
                        struct error *err)
{
    struct json_reading r = {.name = name, .err = err};
    struct tokenizer *tokenizer = NULL;
    r.source.file = name;
    r.source.tokens_field = "tokenizer.json: model.vocab";
    r.source.kinds_field = "tokenizer.json: added_tokens";
    r.source.merges_field = "tokenizer.json: model.merges";
    r.source.chat_template = files->chat_template;
    int rc = parse(&r, "tokenizer.json", files->tokenizer, TOKENIZER_JSON_BYTES_MAX, 0, &r.root);
    /* Its numbers do not matter, and transformers writes 10^30 for a length that nobody set. */
    if (rc == 0 && files->config.len > 0)
        rc = parse(&r, "tokenizer_config.json", files->config, TOKENIZER_CONFIG_BYTES_MAX, JSON_DECODE_INT_AS_REAL,
                   &r.config);
    if (rc == 0)
        rc = read_all(&r);
    if (rc == 0)
        rc = tokenizer_build(&r.source, &tokenizer, err);
    if (rc == 0 && (rc = check_unknown(&r, tokenizer)) < 0)
        tokenizer_free(tokenizer);
    if (rc == 0)
        *ret_tokenizer = tokenizer;
    json_decref(r.root);
    json_decref(r.config);
    free(r.texts);
    free(r.kinds);
    free(r.merges);
    return rc;
}
