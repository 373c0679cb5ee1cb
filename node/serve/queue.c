#include "node/serve/queue.h"

#include <time.h>

void question_free(struct question *q)
{
    if (!q)
        return;
    completion_release(&q->completion);
    free(q);
}

void question_queue_init(struct question_queue *queue, unsigned max)
{
    pthread_condattr_t attributes;

    *queue = (struct question_queue){.max = max};
    queue->last = &queue->first;
    pthread_mutex_init(&queue->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&queue->filled, &attributes);
    pthread_condattr_destroy(&attributes);
}

void question_queue_release(struct question_queue *queue)
{
    assert(!queue->first);
    pthread_mutex_destroy(&queue->lock);
    pthread_cond_destroy(&queue->filled);
}

/* Takes everything out for which gone says so (NULL: all); lock held. Returns the list. */
static struct question *take_out(struct question_queue *queue, bool (*gone)(const struct http_request *r))
{
    struct question *out = NULL, **link = &queue->first;

    while (*link) {
        struct question *q = *link;
        if (gone && !gone(q->http)) {
            link = &q->next;
            continue;
        }
        *link = q->next;
        q->next = out;
        out = q;
        queue->length--;
    }
    queue->last = link;
    return out;
}

static void refuse_list(struct question *q)
{
    while (q) {
        struct question *next = q->next;
        http_reply_error(q->http, 503, "server_error", "the server is stopping");
        question_free(q);
        q = next;
    }
}

int question_queue_push(struct question_queue *queue, struct question *q)
{
    struct question *gone = NULL;
    int rc = 0;

    pthread_mutex_lock(&queue->lock);
    if (queue->length >= queue->max)
        gone = take_out(queue, http_request_gone);
    if (queue->closed) {
        rc = ERR_CONNECT;
    } else if (queue->length >= queue->max) {
        rc = ERR_AGAIN;
    } else {
        q->next = NULL;
        *queue->last = q;
        queue->last = &q->next;
        queue->length++;
        pthread_cond_signal(&queue->filled);
    }
    pthread_mutex_unlock(&queue->lock);
    refuse_list(gone);
    return rc;
}

int question_queue_pop(struct question_queue *queue, int64_t wait_ms, struct question **ret_question)
{
    struct timespec until;
    struct question *q;
    int rc = 0;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += wait_ms / 1000;
    until.tv_nsec += wait_ms % 1000 * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&queue->lock);
    while (!queue->first && !queue->closed)
        if (pthread_cond_timedwait(&queue->filled, &queue->lock, &until) != 0)
            break;
    q = queue->first;
    if (q) {
        queue->first = q->next;
        if (!queue->first)
            queue->last = &queue->first;
        queue->length--;
    } else if (queue->closed) {
        rc = ERR_NOT_FOUND;
    }
    pthread_mutex_unlock(&queue->lock);
    if (rc == 0)
        *ret_question = q;
    return rc;
}

void question_queue_close(struct question_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->closed = true;
    pthread_cond_signal(&queue->filled);
    pthread_mutex_unlock(&queue->lock);
}

void question_queue_refuse(struct question_queue *queue)
{
    struct question *all;

    pthread_mutex_lock(&queue->lock);
    all = take_out(queue, NULL);
    pthread_mutex_unlock(&queue->lock);
    refuse_list(all);
}

unsigned question_queue_length(struct question_queue *queue)
{
    unsigned length;

    pthread_mutex_lock(&queue->lock);
    length = queue->length;
    pthread_mutex_unlock(&queue->lock);
    return length;
}
