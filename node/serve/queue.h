/*
 * The bounded queue of questions between the HTTP thread and the answering thread.
 *
 * Thread-safe; one thread pops. Questions whose clients have hung up are thrown out when the queue is full.
 *
 *     if (question_queue_push(&queue, question) < 0) ... 429 ...
 *     while (question_queue_pop(&queue, 1000, &question) == 0) ...
 */
#ifndef NODE_SERVE_QUEUE_H
#define NODE_SERVE_QUEUE_H

#include "node/serve/completion.h"
#include "runtime/http.h"

#include <pthread.h>

struct question {
    struct question *next;
    struct http_request *http; /* deferred: exactly one reply is due */
    struct completion completion;
    int64_t queued_ms;
};
void question_free(struct question *q); /* not its http; accepts NULL */

struct question_queue {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    struct question *first, **last;
    unsigned length, max;
    bool closed;
};

void question_queue_init(struct question_queue *queue, unsigned max);
void question_queue_release(struct question_queue *queue); /* empty */
/* Takes q over. ERR_AGAIN: full; ERR_CONNECT: closed. Then q is still the caller's. */
int MUST_USE question_queue_push(struct question_queue *queue, struct question *q);
/* Waits up to wait_ms for a question; *ret_question is NULL when none came. ERR_NOT_FOUND: closed and empty. */
int MUST_USE question_queue_pop(struct question_queue *queue, int64_t wait_ms, struct question **ret_question);
/* No more pushes; what waits can still be popped. */
void question_queue_close(struct question_queue *queue);
/* Replies 503 to everything that waits. */
void question_queue_refuse(struct question_queue *queue);
unsigned question_queue_length(struct question_queue *queue);

#endif
