/*
 * Error codes and messages.
 *
 * A function that can fail returns 0 on success and a negative ERR_ code otherwise; where outside data enters, a
 * trailing `struct error *err` (may be NULL) carries a message that a person can act on: what was wrong, where, what
 * was expected, how to mend it. Messages never hold secrets, prompts or record contents. Programmer errors are asserted
 * instead.
 *
 *     struct error err = {0};
 *     if (gguf_open(&file, path, &err) < 0)
 *         return cli_fail(&err);
 *
 * The codes from ERR_FAILED to ERR_BUG are the negated exit codes of both programs.
 */
#ifndef BASE_ERROR_H
#define BASE_ERROR_H

#include "base/banned.h"

#include <assert.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    ERR_FAILED = -1,    /* the job or the operation failed */
    ERR_CONFIG = -2,    /* usage or configuration; message has file:line and key */
    ERR_CONNECT = -3,   /* connect, TLS or authentication */
    ERR_TIMEOUT = -4,   /* a deadline passed */
    ERR_POLICY = -5,    /* refused by policy: consent, epsilon, window, floors */
    ERR_INTEGRITY = -6, /* wrong hash, signature, format or a malformed file or message */
    ERR_RESOURCES = -7, /* memory, disk, descriptors */
    ERR_BUG = -8,       /* a state that must not occur */
    ERR_NOT_FOUND = -20,
    ERR_EXISTS = -21,
    ERR_AGAIN = -22, /* not yet: ask again later */
};

#define MUST_USE __attribute__((warn_unused_result))
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))
#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

struct error {
    int code;
    char message[1024];
};

/* Writes code and message into err unless err is NULL; returns code, so that `return error_set(err, ...)` reads well.
 */
int error_set(struct error *err, int code, const char *format, ...) PRINTF_LIKE(3, 4);
#ifdef __clang_analyzer__ /* which sees one file at a time: the result is negative */
#define error_set(...) ((void)(error_set)(__VA_ARGS__), -1)
#endif

/* Puts "context: " before the message that err already carries; returns err->code. */
int error_prefix(struct error *err, const char *format, ...) PRINTF_LIKE(2, 3);

/* 0 for 0, the exit code of architecture's table for ERR_FAILED..ERR_BUG, 1 for the rest. */
int error_exit_code(int code);

#endif
