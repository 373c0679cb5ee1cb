#include "base/log.h"

#include "base/clock.h"

#include <stdatomic.h>
#include <unistd.h>

static const char *const level_names[] = {"debug", "info", "warn", "error"};
static _Atomic int log_threshold = LOG_INFO;

void log_set_level(enum log_level level)
{
    log_threshold = (int)level;
}

int log_level_parse(const char *name, enum log_level *ret_level)
{
    for (size_t i = 0; i < ARRAY_LEN(level_names); i++) {
        if (strcmp(name, level_names[i]) == 0) {
            *ret_level = (enum log_level)i;
            return 0;
        }
    }
    return ERR_CONFIG;
}

/* JSON string escapes; bytes outside printable ASCII as \u00xx, so that no terminal or log viewer interprets them. */
static void escape(const char *in, char *out, size_t size)
{
    size_t used = 0;

    for (; *in && used + 7 < size; in++) {
        unsigned char c = (unsigned char)*in;
        if (c == '"' || c == '\\') {
            out[used++] = '\\';
            out[used++] = (char)c;
        } else if (c < 0x20 || c >= 0x7f) {
            used += (size_t)snprintf(out + used, 7, "\\u%04x", c);
        } else {
            out[used++] = (char)c;
        }
    }
    out[used] = 0;
}

static size_t put_field(char *line, size_t used, size_t size, const char *key, const char *value)
{
    char safe[256];
    int n;

    if (!value)
        return used;
    escape(value, safe, sizeof safe);
    n = snprintf(line + used, size - used, ",\"%s\":\"%s\"", key, safe);
    return n > 0 && (size_t)n < size - used ? used + (size_t)n : used;
}

void log_write(const struct log_context *c, enum log_level level, const char *format, ...)
{
    char raw[1200], safe[2400], line[3600], when[CLOCK_RFC3339_SIZE];
    va_list args;
    size_t used;
    ssize_t written;

    if ((int)level < log_threshold)
        return;
    va_start(args, format);
    vsnprintf(raw, sizeof raw, format, args);
    va_end(args);
    escape(raw, safe, sizeof safe);
    clock_format_rfc3339(clock_wall_ms(&clock_system), when);
    if (isatty(STDERR_FILENO)) {
        used = (size_t)snprintf(line, sizeof line, "%.8s %-5s %s%s%s: %s\n", when + 11, level_names[level],
                                c->site ? c->site : "", c->site ? "/" : "", c->component, safe);
    } else {
        used = (size_t)snprintf(line, sizeof line, "{\"time\":\"%s\",\"level\":\"%s\",\"component\":\"%s\"", when,
                                level_names[level], c->component);
        used = put_field(line, used, sizeof line, "site", c->site);
        used = put_field(line, used, sizeof line, "job", c->job);
        if (c->round)
            used += (size_t)snprintf(line + used, sizeof line - used, ",\"round\":%u", c->round);
        used += (size_t)snprintf(line + used, sizeof line - used, ",\"message\":\"%s\"}\n", safe);
    }
    if (used >= sizeof line)
        used = sizeof line - 1;
    written = write(STDERR_FILENO, line, used);
    (void)written; /* nowhere left to complain */
}
