/*
 * Training and evaluation records: JSON lines {"messages": [{"role": ..., "content": ...}, ...]}, tokenised once and
 * held in memory at 5 bytes a token.
 *
 * Line rules. Blank lines are passed over. A usable line is valid UTF-8, one JSON object without duplicate keys whose
 * "messages" is a list of 1 to messages_max objects with a known role and a string content, a system message in first
 * place only, a last message from the assistant that is not empty. Any other line is counted by kind, with its first
 * few line numbers, and passed over; **a record longer than tokens_max is dropped whole and counted, never cut** (a cut
 * record would teach a wrong ending). No content is ever printed or put into a message.
 *
 * Immutable once loaded; any number of threads may read.
 *
 *     struct dataset_options options = {.tokenizer = tokenizer, .chat = {.system = CHAT_SYSTEM_NONE},
 *                                       .tokens_max = 256};
 *     if (dataset_load(path, &options, &dataset, err) < 0) ...
 *     dataset_example(dataset, i, &example);
 *     batch_add(&batch, &example);
 */
#ifndef FORMATS_DATASET_H
#define FORMATS_DATASET_H

#include "model/batch.h"
#include "model/formats/chat.h"

#define DATASET_ANSWERS_MAX 32
#define DATASET_FAULT_LINES 5

enum dataset_fault {
    DATASET_LINE_TOO_LONG, /* more than line_bytes_max */
    DATASET_BAD_UTF8,
    DATASET_BAD_JSON, /* also duplicate keys and anything but an object */
    /* No "messages" list, a message without role or content, an unknown role, a late system message, or an order that
     * the chat format has no place for. */
    DATASET_BAD_MESSAGES,
    DATASET_NO_ANSWER, /* the last message is not a non-empty one from the assistant */
    DATASET_BAD_UNIT,  /* privacy_unit: the field is absent, or neither a string nor an integer */
    DATASET_TOO_LONG,  /* more than tokens_max tokens: dropped */
    DATASET_FAULT_COUNT
};

struct dataset_options {
    const struct tokenizer *tokenizer; /* used while loading only */
    struct chat_options chat;          /* generation_prompt is ignored */
    int32_t tokens_max;                /* of one record */
    size_t line_bytes_max;             /* 0: 1 MiB */
    size_t messages_max;               /* of one record; 0: 256 */
    size_t records_max;                /* 0: 1 million; more is ERR_RESOURCES */
    size_t tokens_total_max;           /* 0: 256 million; more is ERR_RESOURCES */
    const char *privacy_unit;          /* a top-level field whose value groups records; NULL: each record by itself */
};

struct dataset_report {
    size_t lines; /* not blank */
    size_t records;
    size_t tokens, label_tokens, longest; /* longest: tokens of the longest record kept */
    size_t faults[DATASET_FAULT_COUNT];
    size_t fault_lines[DATASET_FAULT_COUNT][DATASET_FAULT_LINES]; /* first line numbers, from 1; 0: none */
};

/* One of the distinct last answers. Texts are data: never print them outside an evaluation that was asked for. */
struct dataset_answer {
    struct span text;   /* borrowed from the dataset */
    const int32_t *ids; /* content and <|im_end|> */
    int32_t count;
    size_t records; /* that carry it */
};

struct dataset;

/* ERR_NOT_FOUND; ERR_INTEGRITY if no line is usable (the message counts the kinds); ERR_RESOURCES. */
int MUST_USE dataset_load(const char *path, const struct dataset_options *options, struct dataset **ret_dataset,
                          struct error *err);
/* The same from bytes; name stands in messages. */
int MUST_USE dataset_parse(struct span text, const char *name, const struct dataset_options *options,
                           struct dataset **ret_dataset, struct error *err);
void dataset_free(struct dataset *dataset); /* accepts NULL */

const struct dataset_report *dataset_report(const struct dataset *dataset);
const char *dataset_fault_name(enum dataset_fault fault); /* "not UTF-8" ... */
/* "3 lines skipped: not UTF-8 (lines 4, 9), longer than 256 tokens (line 11)", or "" if all were used. */
void dataset_describe_faults(const struct dataset_report *report, char *out, size_t size);

size_t dataset_count(const struct dataset *dataset);
void dataset_example(const struct dataset *dataset, size_t i, struct batch_example *ret_example); /* borrowed */
/* Tokens before the last answer's first: what an evaluation prompts with. */
int32_t dataset_prompt_length(const struct dataset *dataset, size_t i);

/* Privacy units: numbered from 0 in the order of first appearance; the keys themselves are not kept. Without
 * privacy_unit, unit i is record i. */
size_t dataset_unit_count(const struct dataset *dataset);
size_t dataset_unit(const struct dataset *dataset, size_t i);

/* The distinct last answers in the order of first appearance; 0 if there are more than DATASET_ANSWERS_MAX. */
size_t dataset_answer_count(const struct dataset *dataset);
const struct dataset_answer *dataset_answer_at(const struct dataset *dataset, size_t answer);
/* The answer that record i carries, or −1 if there is no list. */
int32_t dataset_answer_of(const struct dataset *dataset, size_t i);

#endif
