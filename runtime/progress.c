#include "runtime/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

void progress_init(struct progress *p, const struct clock *clock, int64_t every_ms)
{
    *p = (struct progress){.clock = clock, .fd = STDERR_FILENO, .every_ms = every_ms, .printed_ms = -1};
    p->tty = isatty(p->fd);
}

static void put(const struct progress *p, const char *text, size_t len)
{
    while (len > 0) {
        ssize_t n = write(p->fd, text, len);
        if (n <= 0)
            return; /* progress is never worth a failure */
        text += n;
        len -= (size_t)n;
    }
}

/* Bytes of text that fit in `columns`, one column a character; UTF-8 continuation bytes take none. */
static size_t fit(const char *text, size_t columns)
{
    size_t i = 0;
    for (; text[i]; i++)
        if (((unsigned char)text[i] & 0xc0) != 0x80 && columns-- == 0)
            break;
    return i;
}

void progress_update(struct progress *p, uint64_t key, const char *format, ...)
{
    char text[512], line[560];
    int64_t now = clock_monotonic_ms(p->clock);
    int64_t wait = p->tty ? 100 : p->every_ms;
    if (p->printed_ms >= 0 && key == p->key && now - p->printed_ms < wait)
        return;
    p->printed_ms = now;
    p->key = key;
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    struct winsize size = {0};
    size_t columns = p->tty && ioctl(p->fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1u : 200;
    int len = snprintf(line, sizeof line, p->tty ? "\r%.*s\033[K" : "%.*s\n", (int)fit(text, columns), text);
    put(p, line, (size_t)len);
    p->open = p->tty;
}

void progress_break(struct progress *p)
{
    if (p->open)
        put(p, "\n", 1);
    p->open = false;
}

void progress_end(struct progress *p)
{
    progress_break(p);
}
