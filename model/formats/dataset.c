#include "model/formats/dataset.h"

#include "base/checked.h"
#include "model/formats/utf8.h"

#include <errno.h>
#include <jansson.h>

#define LINE_BYTES_DEFAULT ((size_t)1 << 20)
#define MESSAGES_DEFAULT ((size_t)256)
#define RECORDS_DEFAULT ((size_t)1000000)
#define TOKENS_DEFAULT ((size_t)256 << 20)

struct record {
    size_t first; /* token */
    int32_t length, prompt;
    int32_t answer; /* −1: none */
    uint32_t unit;
};

struct dataset {
    struct dataset_report report;
    struct token_list tokens;
    struct record *records;
    size_t count, capacity, unit_count;
    struct dataset_answer answers[DATASET_ANSWERS_MAX];
    size_t answer_count;
    bool too_many_answers;
};

/* What is needed only while loading. */
struct loading {
    struct dataset *d;
    struct dataset_options o; /* defaults filled in */
    const char *name;
    struct token_list one; /* the record at hand */
    struct chat_message *messages;
    json_t *units; /* privacy unit → its number; jansson's own seeded hash table */
    size_t line;
    struct error *err;
};

const char *dataset_fault_name(enum dataset_fault fault)
{
    static const char *const names[DATASET_FAULT_COUNT] = {
        "line too long",
        "not UTF-8",
        "not a JSON object",
        "no usable \"messages\" list (role and content)",
        "no answer by the assistant at the end",
        "no privacy unit",
        "more tokens than allowed",
    };
    assert((unsigned)fault < DATASET_FAULT_COUNT);
    return names[fault];
}

static int count_fault(struct loading *l, enum dataset_fault fault)
{
    const size_t n = l->d->report.faults[fault]++;
    if (n < DATASET_FAULT_LINES)
        l->d->report.fault_lines[fault][n] = l->line;
    return 0;
}

/* True and *ret_count written if root's messages are as dataset.h asks; the contents are borrowed from root. */
static bool read_messages(struct loading *l, const json_t *root, size_t *ret_count)
{
    const json_t *list = json_object_get(root, "messages");
    const size_t count = json_array_size(list);
    if (!json_is_array(list) || count == 0 || count > l->o.messages_max)
        return false;
    for (size_t i = 0; i < count; i++) {
        const json_t *item = json_array_get(list, i);
        const json_t *role = json_object_get(item, "role"), *content = json_object_get(item, "content");
        struct chat_message *m = &l->messages[i];
        if (!json_is_string(role) || !json_is_string(content) ||
            !chat_role_parse(span_of(json_string_value(role), json_string_length(role)), &m->role))
            return false;
        if (m->role == CHAT_SYSTEM && i > 0)
            return false;
        m->content = span_of(json_string_value(content), json_string_length(content));
    }
    *ret_count = count;
    return true;
}

/* The number of the record's privacy unit; −1 if the field is unusable, else ERR_RESOURCES. */
static int64_t read_unit(struct loading *l, const json_t *root)
{
    char digits[32];
    const json_t *value = json_object_get(root, l->o.privacy_unit);
    const char *key = json_string_value(value);
    if (json_is_integer(value)) {
        snprintf(digits, sizeof digits, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        key = digits;
    }
    if (!key || !key[0])
        return -1;
    const json_t *known = json_object_get(l->units, key);
    if (known)
        return json_integer_value(known);
    if (json_object_set_new(l->units, key, json_integer((json_int_t)l->d->unit_count)) != 0)
        return ERR_RESOURCES;
    return (int64_t)l->d->unit_count++;
}

static void drop_answers(struct dataset *d)
{
    for (size_t i = 0; i < d->answer_count; i++) {
        free((void *)d->answers[i].text.ptr);
        free((void *)d->answers[i].ids);
    }
    d->answer_count = 0;
}

static int add_answer(struct loading *l, struct span text, int32_t *ret_answer)
{
    struct dataset *d = l->d;
    struct token_list ids = {.max = (size_t)l->o.tokens_max + 1};
    struct dataset_answer *a = &d->answers[d->answer_count];
    *ret_answer = -1;
    if (d->too_many_answers)
        return 0;
    for (size_t i = 0; i < d->answer_count; i++) {
        if (span_equal(d->answers[i].text, text)) {
            d->answers[i].records++;
            *ret_answer = (int32_t)i;
            return 0;
        }
    }
    if (d->answer_count == DATASET_ANSWERS_MAX) {
        d->too_many_answers = true;
        drop_answers(d);
        return 0;
    }
    uint8_t *copy = malloc(text.len);
    int rc = copy ? chat_encode_answer(l->o.tokenizer, text, &ids, l->err)
                  : error_set(l->err, ERR_RESOURCES, "%s: no memory", l->name);
    free(ids.learn);
    if (rc < 0) {
        free(copy);
        free(ids.ids);
        return rc;
    }
    memcpy(copy, text.ptr, text.len);
    *a = (struct dataset_answer){span_of(copy, text.len), ids.ids, (int32_t)ids.count, 1};
    *ret_answer = (int32_t)d->answer_count++;
    return 0;
}

/* Room for one more record and n more tokens. */
static int reserve(struct loading *l, size_t n)
{
    struct dataset *d = l->d;
    if (d->count == l->o.records_max)
        return error_set(l->err, ERR_RESOURCES,
                         "%s: line %zu: more than %zu records; raise the limit or split the file", l->name, l->line,
                         l->o.records_max);
    if (n > l->o.tokens_total_max - d->tokens.count)
        return error_set(l->err, ERR_RESOURCES,
                         "%s: line %zu: more than %zu tokens in all; raise the limit or split the "
                         "file",
                         l->name, l->line, l->o.tokens_total_max);
    if (d->count < d->capacity)
        return 0;
    size_t capacity = d->capacity ? 2 * d->capacity : 256;
    struct record *records = realloc(d->records, capacity * sizeof *records);
    if (!records)
        return error_set(l->err, ERR_RESOURCES, "%s: no memory for %zu records", l->name, capacity);
    d->records = records;
    d->capacity = capacity;
    return 0;
}

/* Keeps the record in l->one. Rows after the last label teach nothing and cost time, so they are left out. */
static int keep(struct loading *l, struct span answer, uint32_t unit)
{
    struct dataset *d = l->d;
    struct record r = {.first = d->tokens.count, .unit = unit};
    size_t length = l->one.count, prompt;
    while (length > 0 && !l->one.learn[length - 1])
        length--;
    for (prompt = length; prompt > 0 && l->one.learn[prompt - 1]; prompt--)
        ;
    int rc = reserve(l, length);
    if (rc == 0)
        rc = add_answer(l, answer, &r.answer);
    for (size_t i = 0; rc == 0 && i < length; i++) {
        rc = token_list_append(&d->tokens, l->one.ids[i], l->one.learn[i], l->err);
        d->report.label_tokens += l->one.learn[i];
    }
    if (rc < 0)
        return rc;
    r.length = (int32_t)length;
    r.prompt = (int32_t)prompt;
    d->records[d->count++] = r;
    if (length > d->report.longest)
        d->report.longest = length;
    return 0;
}

static int read_record(struct loading *l, const json_t *root)
{
    size_t count = 0;
    int64_t unit = (int64_t)l->d->count;
    if (!json_is_object(root))
        return count_fault(l, DATASET_BAD_JSON);
    if (!read_messages(l, root, &count))
        return count_fault(l, DATASET_BAD_MESSAGES);
    const struct chat_message *last = &l->messages[count - 1];
    if (last->role != CHAT_ASSISTANT || last->content.len == 0)
        return count_fault(l, DATASET_NO_ANSWER);
    token_list_clear(&l->one);
    /* One token more than allowed, for the newline after the last message, which is not kept. */
    int rc = chat_encode(l->o.tokenizer, &l->o.chat, l->messages, count, &l->one, l->err);
    if (rc == ERR_RESOURCES)
        return count_fault(l, DATASET_TOO_LONG);
    if (rc == ERR_CONFIG) /* the chat format was checked before: the messages do not follow each other as it asks */
        return count_fault(l, DATASET_BAD_MESSAGES);
    if (rc < 0)
        return rc;
    if (l->o.privacy_unit && (unit = read_unit(l, root)) == -1)
        return count_fault(l, DATASET_BAD_UNIT);
    if (unit < 0)
        return error_set(l->err, ERR_RESOURCES, "%s: no memory for the privacy units", l->name);
    return keep(l, last->content, (uint32_t)unit);
}

static int read_line(struct loading *l, struct span line, bool too_long)
{
    size_t blank = 0;
    l->line++;
    if (l->line == 1 && line.len >= 3 && memcmp(line.ptr, "\xef\xbb\xbf", 3) == 0)
        line = span_of(line.ptr + 3, line.len - 3);
    while (blank < line.len && (line.ptr[blank] == ' ' || line.ptr[blank] == '\t' || line.ptr[blank] == '\r'))
        blank++;
    if (blank == line.len && !too_long)
        return 0;
    l->d->report.lines++;
    if (too_long || line.len > l->o.line_bytes_max)
        return count_fault(l, DATASET_LINE_TOO_LONG);
    if (!utf8_valid(line.ptr, line.len))
        return count_fault(l, DATASET_BAD_UTF8);
    json_t *root = json_loadb((const char *)line.ptr, line.len, JSON_REJECT_DUPLICATES, NULL);
    int rc = root ? read_record(l, root) : count_fault(l, DATASET_BAD_JSON);
    json_decref(root);
    return rc;
}

static int read_span(struct loading *l, struct span text)
{
    while (text.len > 0) {
        const uint8_t *end = memchr(text.ptr, '\n', text.len);
        const size_t len = end ? (size_t)(end - text.ptr) : text.len, step = end ? len + 1 : len;
        int rc = read_line(l, span_of(text.ptr, len), false);
        if (rc < 0)
            return rc;
        text = span_of(text.ptr + step, text.len - step);
    }
    return 0;
}

/* Line by line, with no more than one line in memory. */
static int read_stream(struct loading *l, FILE *file)
{
    struct buffer line;
    int rc = 0, c;
    buffer_init(&line, l->o.line_bytes_max);
    while (rc == 0 && (c = getc_unlocked(file)) != EOF) {
        if (c != '\n') {
            buffer_u8(&line, (uint8_t)c);
            continue;
        }
        rc = read_line(l, buffer_span(&line), !buffer_ok(&line));
        buffer_clear(&line);
    }
    if (rc == 0 && (line.len > 0 || !buffer_ok(&line)))
        rc = read_line(l, buffer_span(&line), !buffer_ok(&line));
    if (rc == 0 && ferror(file))
        rc = error_set(l->err, ERR_FAILED, "%s: reading failed: %s", l->name, strerror(errno));
    buffer_release(&line);
    return rc;
}

static int begin(struct loading *l, const struct dataset_options *options)
{
    l->o = *options;
    l->o.chat.generation_prompt = false;
    l->o.line_bytes_max = l->o.line_bytes_max ? l->o.line_bytes_max : LINE_BYTES_DEFAULT;
    l->o.messages_max = l->o.messages_max ? l->o.messages_max : MESSAGES_DEFAULT;
    l->o.records_max = l->o.records_max ? l->o.records_max : RECORDS_DEFAULT;
    l->o.tokens_total_max = l->o.tokens_total_max ? l->o.tokens_total_max : TOKENS_DEFAULT;
    assert(l->o.tokens_max > 0);
    l->one.max = (size_t)l->o.tokens_max + 1;
    l->d = calloc(1, sizeof *l->d);
    l->messages = calloc(l->o.messages_max, sizeof *l->messages);
    l->units = json_object();
    if (!l->d || !l->messages || !l->units)
        return error_set(l->err, ERR_RESOURCES, "%s: no memory", l->name);
    l->d->tokens.max = l->o.tokens_total_max;
    return chat_check(l->o.tokenizer, l->err);
}

/* Hands the data set over, or fails if no line was usable. */
static int finish(struct loading *l, int rc, struct dataset **ret_dataset)
{
    char faults[512];
    if (rc == 0) {
        l->d->report.records = l->d->count;
        l->d->report.tokens = l->d->tokens.count;
        if (!l->o.privacy_unit)
            l->d->unit_count = l->d->count;
        dataset_describe_faults(&l->d->report, faults, sizeof faults);
        if (l->d->report.lines == 0)
            rc = error_set(l->err, ERR_INTEGRITY,
                           "%s: the file is empty; expected one JSON object with \"messages\" a "
                           "line",
                           l->name);
        else if (l->d->count == 0)
            rc = error_set(l->err, ERR_INTEGRITY, "%s: none of %zu lines is usable: %s", l->name, l->d->report.lines,
                           faults);
    }
    if (rc < 0)
        dataset_free(l->d);
    else
        *ret_dataset = l->d;
    token_list_release(&l->one);
    free(l->messages);
    json_decref(l->units);
    return rc;
}

int dataset_parse(struct span text, const char *name, const struct dataset_options *options,
                  struct dataset **ret_dataset, struct error *err)
{
    struct loading l = {.name = name, .err = err};
    int rc = begin(&l, options);
    if (rc == 0)
        rc = read_span(&l, text);
    return finish(&l, rc, ret_dataset);
}

int dataset_load(const char *path, const struct dataset_options *options, struct dataset **ret_dataset,
                 struct error *err)
{
    const char *slash = strrchr(path, '/');
    struct loading l = {.name = slash ? slash + 1 : path, .err = err};
    FILE *file = fopen(path, "rbe");
    if (!file)
        return error_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_FAILED, "%s: cannot be opened: %s", path,
                         strerror(errno));
    int rc = begin(&l, options);
    if (rc == 0)
        rc = read_stream(&l, file);
    fclose(file);
    return finish(&l, rc, ret_dataset);
}

void dataset_free(struct dataset *dataset)
{
    if (!dataset)
        return;
    drop_answers(dataset);
    token_list_release(&dataset->tokens);
    free(dataset->records);
    free(dataset);
}

const struct dataset_report *dataset_report(const struct dataset *dataset)
{
    return &dataset->report;
}

void dataset_describe_faults(const struct dataset_report *report, char *out, size_t size)
{
    size_t total = 0, used = 0;
    out[0] = '\0';
    for (int f = 0; f < DATASET_FAULT_COUNT; f++)
        total += report->faults[f];
    if (total == 0)
        return;
    used += (size_t)snprintf(out, size, "%zu line%s skipped", total, total == 1 ? "" : "s");
    for (int f = 0; f < DATASET_FAULT_COUNT; f++) {
        if (report->faults[f] == 0)
            continue;
        for (size_t i = 0; i < DATASET_FAULT_LINES && report->fault_lines[f][i] && used < size; i++)
            used += i == 0 ? (size_t)snprintf(out + used, size - used, "; %zu %s (line %zu", report->faults[f],
                                              dataset_fault_name((enum dataset_fault)f), report->fault_lines[f][i])
                           : (size_t)snprintf(out + used, size - used, ", %zu", report->fault_lines[f][i]);
        if (used < size)
            used += (size_t)snprintf(out + used, size - used, "%s",
                                     report->faults[f] > DATASET_FAULT_LINES ? ", ...)" : ")");
    }
}

size_t dataset_count(const struct dataset *dataset)
{
    return dataset->count;
}

void dataset_example(const struct dataset *dataset, size_t i, struct batch_example *ret_example)
{
    assert(i < dataset->count);
    const struct record *r = &dataset->records[i];
    *ret_example = (struct batch_example){dataset->tokens.ids + r->first, dataset->tokens.learn + r->first, r->length};
}

int32_t dataset_prompt_length(const struct dataset *dataset, size_t i)
{
    assert(i < dataset->count);
    return dataset->records[i].prompt;
}

size_t dataset_unit_count(const struct dataset *dataset)
{
    return dataset->unit_count;
}

size_t dataset_unit(const struct dataset *dataset, size_t i)
{
    assert(i < dataset->count);
    return dataset->records[i].unit;
}

size_t dataset_answer_count(const struct dataset *dataset)
{
    return dataset->answer_count;
}

const struct dataset_answer *dataset_answer_at(const struct dataset *dataset, size_t answer)
{
    assert(answer < dataset->answer_count);
    return &dataset->answers[answer];
}

int32_t dataset_answer_of(const struct dataset *dataset, size_t i)
{
    assert(i < dataset->count);
    return dataset->too_many_answers ? -1 : dataset->records[i].answer;
}
