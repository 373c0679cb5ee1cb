/*
 * Small text helpers of configuration, command line and progress: durations, sizes, nearest name.
 *
 * Pure functions; any thread.
 */
#ifndef RUNTIME_TEXT_H
#define RUNTIME_TEXT_H

#include "base/error.h"

/* "250ms", "30s", "5m", "2h", "7d" or a bare "0" → milliseconds. ERR_CONFIG without a message otherwise. */
int MUST_USE text_parse_duration_ms(const char *text, int64_t *ret_ms);
/* "512", "64KiB", "4MiB", "2GiB" (1024) or "4kB", "4MB", "2GB" (1000) → bytes. ERR_CONFIG otherwise. */
int MUST_USE text_parse_bytes(const char *text, int64_t *ret_bytes);
/* Whole text as a decimal integer or a finite number; ERR_CONFIG otherwise. Locale-independent. */
int MUST_USE text_parse_int(const char *text, int64_t *ret_value);
int MUST_USE text_parse_float(const char *text, double *ret_value);

#define TEXT_SIZE 32
void text_format_duration(int64_t ms, char out[TEXT_SIZE]);  /* "03:12", "1:02:03" */
void text_format_bytes(uint64_t bytes, char out[TEXT_SIZE]); /* "12.4 MB" (1000) */

/* Levenshtein distance with a transposition counted as one; both texts at most 127 bytes, longer ones give 127. */
size_t text_distance(const char *a, const char *b);
/* The candidate nearest to name, or NULL when none is within a third of its length (at least 1). */
const char *text_nearest(const char *name, const char *const *candidates, size_t count);

#endif
