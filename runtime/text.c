#include "runtime/text.h"

#include <ctype.h>
#include <errno.h>
#include <locale.h>
#include <math.h>

int text_parse_int(const char *text, int64_t *ret_value)
{
    const char *digits = text + (*text == '-' || *text == '+');
    if (!isdigit((unsigned char)*digits))
        return ERR_CONFIG;
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (errno || *end)
        return ERR_CONFIG;
    *ret_value = v;
    return 0;
}

int text_parse_float(const char *text, double *ret_value)
{
    /* Digits, signs, one exponent: strtod alone would take nan, inf and hexadecimal. */
    if (!*text || strlen(text) > 64 || strspn(text, "0123456789+-.eE") != strlen(text) || !strpbrk(text, "0123456789"))
        return ERR_CONFIG;
    locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (!c_locale)
        return ERR_RESOURCES;
    char *end;
    double v = strtod_l(text, &end, c_locale);
    freelocale(c_locale);
    if (*end || !isfinite(v))
        return ERR_CONFIG;
    *ret_value = v;
    return 0;
}

struct suffix {
    const char *name;
    int64_t factor;
};

static int parse_suffixed(const char *text, const struct suffix *suffixes, size_t count, int64_t *ret_value)
{
    size_t digits = strspn(text, "0123456789");
    if (digits == 0 || digits > 18)
        return ERR_CONFIG;
    int64_t v = strtoll(text, NULL, 10), product;
    for (size_t i = 0; i < count; i++)
        if (strcmp(text + digits, suffixes[i].name) == 0) {
            if (__builtin_mul_overflow(v, suffixes[i].factor, &product))
                return ERR_CONFIG;
            *ret_value = product;
            return 0;
        }
    return ERR_CONFIG;
}

int text_parse_duration_ms(const char *text, int64_t *ret_ms)
{
    static const struct suffix suffixes[] = {{"ms", 1}, {"s", 1000}, {"m", 60000}, {"h", 3600000}, {"d", 86400000}};
    if (strcmp(text, "0") == 0) {
        *ret_ms = 0;
        return 0;
    }
    return parse_suffixed(text, suffixes, ARRAY_LEN(suffixes), ret_ms);
}

int text_parse_bytes(const char *text, int64_t *ret_bytes)
{
    static const struct suffix suffixes[] = {{"", 1},
                                             {"B", 1},
                                             {"KiB", 1 << 10},
                                             {"MiB", 1 << 20},
                                             {"GiB", 1 << 30},
                                             {"TiB", (int64_t)1 << 40},
                                             {"kB", 1000},
                                             {"MB", 1000000},
                                             {"GB", 1000000000},
                                             {"TB", 1000000000000}};
    return parse_suffixed(text, suffixes, ARRAY_LEN(suffixes), ret_bytes);
}

void text_format_duration(int64_t ms, char out[TEXT_SIZE])
{
    int64_t s = (ms < 0 ? 0 : ms) / 1000;
    if (s >= 3600)
        snprintf(out, TEXT_SIZE, "%lld:%02d:%02d", (long long)(s / 3600), (int)(s / 60 % 60), (int)(s % 60));
    else
        snprintf(out, TEXT_SIZE, "%02d:%02d", (int)(s / 60), (int)(s % 60));
}

void text_format_bytes(uint64_t bytes, char out[TEXT_SIZE])
{
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
    double v = (double)bytes;
    size_t unit = 0;
    while (v >= 999.95 && unit + 1 < ARRAY_LEN(units)) {
        v /= 1000;
        unit++;
    }
    snprintf(out, TEXT_SIZE, unit == 0 ? "%.0f %s" : "%.1f %s", v, units[unit]);
}

#define DISTANCE_MAX 127

size_t text_distance(const char *a, const char *b)
{
    size_t a_len = strlen(a), b_len = strlen(b);
    if (a_len > DISTANCE_MAX || b_len > DISTANCE_MAX)
        return DISTANCE_MAX;
    uint8_t rows[3][DISTANCE_MAX + 1]; /* the last row, the one before it, the current one */
    uint8_t *before = rows[0], *last = rows[1], *row = rows[2];
    memset(before, 0, sizeof rows[0]); /* read only from the second row on */
    for (size_t j = 0; j <= b_len; j++)
        last[j] = (uint8_t)j;
    for (size_t i = 1; i <= a_len; i++) {
        row[0] = (uint8_t)i;
        for (size_t j = 1; j <= b_len; j++) {
            unsigned best = last[j - 1] + (a[i - 1] != b[j - 1]);
            if (last[j] + 1u < best)
                best = last[j] + 1u;
            if (row[j - 1] + 1u < best)
                best = row[j - 1] + 1u;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && before[j - 2] + 1u < best)
                best = before[j - 2] + 1u;
            row[j] = (uint8_t)best;
        }
        uint8_t *spare = before;
        before = last;
        last = row;
        row = spare;
    }
    return last[b_len];
}

const char *text_nearest(const char *name, const char *const *candidates, size_t count)
{
    size_t limit = strlen(name) / 3, best_distance;
    limit = limit ? limit : 1;
    best_distance = limit + 1;
    const char *best = NULL;
    for (size_t i = 0; i < count; i++) {
        size_t distance = text_distance(name, candidates[i]);
        if (distance < best_distance) {
            best_distance = distance;
            best = candidates[i];
        }
    }
    return best;
}
