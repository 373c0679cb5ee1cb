/*
 * Log lines on stderr: text on a terminal, JSON lines otherwise (journald friendly), UTC RFC 3339.
 *
 * Never log gradients, losses, tokens, prompts, keys, record counts of one site, or unescaped text of a peer: messages
 * pass through the escaper here, and what is not printable ASCII comes out escaped. The level is the tree's one mutable
 * global. Thread-safe: one write(2) a line.
 *
 *     struct log_context log = {.component = "round", .site = "clinic-a"};
 *     log_info(&log, "round %u: masked vector acknowledged", round);
 */
#ifndef BASE_LOG_H
#define BASE_LOG_H

#include "base/error.h"

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

struct log_context {
    const char *component; /* never NULL */
    const char *site;      /* NULL: left out */
    const char *job;       /* NULL: left out */
    uint32_t round;        /* 0: left out */
};

void log_set_level(enum log_level level);
/* 0, or ERR_CONFIG for a name other than debug, info, warn, error. */
int MUST_USE log_level_parse(const char *name, enum log_level *ret_level);
void log_write(const struct log_context *c, enum log_level level, const char *format, ...) PRINTF_LIKE(3, 4);

#define log_debug(c, ...) log_write(c, LOG_DEBUG, __VA_ARGS__)
#define log_info(c, ...) log_write(c, LOG_INFO, __VA_ARGS__)
#define log_warn(c, ...) log_write(c, LOG_WARN, __VA_ARGS__)
#define log_error(c, ...) log_write(c, LOG_ERROR, __VA_ARGS__)

#endif
