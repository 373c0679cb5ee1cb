#include "runtime/journal.h"

#include "base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

struct journal {
    int fd;
    bool sync;
    const struct clock *clock;
    char *path;
    pthread_mutex_t lock; /* counts and warns once; the write itself is one system call */
    uint64_t failures;
};

/* A crash may have left a torn last line: end it, so that the next event starts its own. */
static int end_torn_line(int fd)
{
    off_t size = lseek(fd, 0, SEEK_END);
    char last = '\n';
    if (size > 0 && pread(fd, &last, 1, size - 1) != 1)
        return -1;
    return last == '\n' || write(fd, "\n", 1) == 1 ? 0 : -1;
}

int journal_open(struct journal **ret_journal, const char *path, const struct clock *clock, bool sync,
                 struct error *err)
{
    struct journal *j = calloc(1, sizeof *j);
    if (!j || !(j->path = strdup(path))) {
        free(j);
        return error_set(err, ERR_RESOURCES, "%s: out of memory", path);
    }
    j->fd = open(path, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (j->fd < 0 || end_torn_line(j->fd) < 0) {
        int rc = error_set(err, ERR_RESOURCES, "%s: cannot open the event journal: %s", path, strerror(errno));
        if (j->fd >= 0)
            close(j->fd);
        free(j->path);
        free(j);
        return rc;
    }
    j->clock = clock;
    j->sync = sync;
    pthread_mutex_init(&j->lock, NULL);
    *ret_journal = j;
    return 0;
}

void journal_close(struct journal *j)
{
    if (!j)
        return;
    close(j->fd);
    pthread_mutex_destroy(&j->lock);
    free(j->path);
    free(j);
}

static bool write_line(struct journal *j, const char *name, json_t *fields)
{
    char time[CLOCK_RFC3339_SIZE];
    clock_format_rfc3339(clock_wall_ms(j->clock), time);
    json_t *event =
        json_pack("{s:s, s:I, s:s}", "time", time, "mono_ms", (json_int_t)clock_monotonic_ms(j->clock), "event", name);
    if (!event || (fields && json_object_update_missing(event, fields) < 0)) {
        json_decref(event);
        return false;
    }
    char *text = json_dumps(event, JSON_COMPACT | JSON_ENSURE_ASCII);
    json_decref(event);
    size_t len = text ? strlen(text) : 0;
    char *line = text ? realloc(text, len + 1) : NULL;
    bool ok = false;
    if (line) {
        line[len] = '\n'; /* over the NUL: written by length */
        ok = write(j->fd, line, len + 1) == (ssize_t)(len + 1) && (!j->sync || fdatasync(j->fd) == 0);
    }
    free(line ? line : text);
    return ok;
}

void journal_event(struct journal *j, const char *name, json_t *fields)
{
    if (j && !write_line(j, name, fields)) {
        struct log_context log = {.component = "journal"};
        int saved = errno;
        pthread_mutex_lock(&j->lock);
        bool first = j->failures++ == 0;
        pthread_mutex_unlock(&j->lock);
        if (first)
            log_error(&log, "%s: cannot write events: %s; reports will have gaps", j->path, strerror(saved));
    }
    json_decref(fields);
}

uint64_t journal_failures(const struct journal *j)
{
    struct journal *mutable_j = (struct journal *)j;
    pthread_mutex_lock(&mutable_j->lock);
    uint64_t n = j->failures;
    pthread_mutex_unlock(&mutable_j->lock);
    return n;
}

int journal_read(const char *path, int (*visit)(void *ctx, json_t *event), void *ctx, struct error *err)
{
    FILE *file = fopen(path, "re");
    if (!file)
        return error_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_RESOURCES, "%s: cannot read: %s", path,
                         strerror(errno));
    char *line = NULL;
    size_t capacity = 0;
    ssize_t len;
    int rc = 0;
    while (rc == 0 && (len = getline(&line, &capacity, file)) > 0) {
        json_t *event = json_loadb(line, (size_t)len, JSON_REJECT_DUPLICATES, NULL);
        if (json_is_object(event)) /* anything else is a torn line */
            rc = visit(ctx, event);
        json_decref(event);
    }
    free(line);
    fclose(file);
    return rc;
}
