/*
 * What a node and the aggregator say to each other around the secure-aggregation stages: RPC methods, their bodies, and
 * the event a node waits for. Canonical encoding (base/buffer.h); every string is bounded; nothing here is secret.
 *
 * The aggregator keeps one current event per site. SESSION_NEXT carries the cursor (epoch, sequence) of the event that
 * the node has already handled; the reply is held until a newer one exists, or an IDLE event after at most 25 s. The
 * epoch changes when the aggregator restarts, so a stale cursor is answered at once. Stages are lock-step, so only the
 * newest event of a site matters. Every method is idempotent: a node repeats a call whose reply was lost.
 */
#ifndef PROTOCOL_SESSION_H
#define PROTOCOL_SESSION_H

#include "base/buffer.h"
#include "base/reader.h"

#define SESSION_VERSION 2
#define SESSION_JOB_SIZE 64 /* bytes of a job id with its NUL: [a-z0-9-]{1,63} */
#define SESSION_HOLD_MS 25000

enum session_method {
    SESSION_HELLO = 1, /* u32 version → u32 version, bytes roster */
    SESSION_NEXT = 2,  /* u64 epoch, u64 sequence → struct session_event */
    SESSION_SEND = 3,  /* struct session_message → nothing */
    SESSION_BEAT = 4,  /* nothing → nothing: "still training" */
    SESSION_PROOF = 5, /* string job, u64 version → what a site needs to accept that version (protocol/cosign.h) */
    /* 0x0100 …: the chunked transfers of protocol/transport/transfer.h. Objects: "sum" and "state". */
};

enum session_status {
    SESSION_OK = 0,
    SESSION_REFUSED = 1,   /* body: text of the reason */
    SESSION_NOT_FOUND = 2, /* body: text */
    SESSION_LATE = 3,      /* the stage is closed; body: text */
};

enum session_event_kind {
    SESSION_IDLE = 0,      /* nothing new; ask again */
    SESSION_OPEN = 1,      /* payload: bytes M0, u64 version of the model that M0 names */
    SESSION_KEYS = 2,      /* payload: M2 */
    SESSION_DELIVER = 3,   /* payload: M4 of this site */
    SESSION_SURVIVORS = 4, /* payload: M6 */
    SESSION_QUORUM = 5,    /* payload: M8 */
    SESSION_RESULT = 6,    /* payload: bytes M10; the sum itself is fetched as the object "sum" */
    SESSION_ABORT = 7,     /* payload: text of the reason; the attempt is dead */
    SESSION_DONE = 8,      /* the job ended; payload: u64 last version, text */
};

/* What SESSION_SEND carries: the node's half of a stage. */
enum session_stage {
    SESSION_M1_ADVERTISE = 1,
    SESSION_M3_SHARES = 3,
    SESSION_M5_MASKED = 5, /* signature over (H2, root), after the upload was committed */
    SESSION_M7_CONSISTENCY = 7,
    SESSION_M9_UNMASK = 9,
    SESSION_COSIGN = 11,
    SESSION_DECLINE = 12,   /* the site does not take part; payload: what it is about, without figures of the site */
    SESSION_UNWILLING = 13, /* the same, and it does not want to be invited to this job until it says WILLING */
    SESSION_WILLING = 14,   /* consent was given, or the hours have come; any round */
};

struct session_cursor {
    uint64_t epoch, sequence;
};

struct session_event {
    struct session_cursor cursor;
    enum session_event_kind kind;
    char job[SESSION_JOB_SIZE]; /* "-" in IDLE */
    uint64_t round;
    uint32_t attempt;
    struct span payload; /* borrowed from the decoded bytes */
};

struct session_message {
    enum session_stage stage;
    char job[SESSION_JOB_SIZE];
    uint64_t round;
    uint32_t attempt;
    struct span payload;
};

void session_event_encode(const struct session_event *event, struct buffer *out);
int MUST_USE session_event_decode(struct span bytes, struct session_event *ret_event, struct error *err);
void session_message_encode(const struct session_message *message, struct buffer *out);
int MUST_USE session_message_decode(struct span bytes, struct session_message *ret_message, struct error *err);

/* What stands for the frozen factors in the model hash: SHA-256 of the LoRA configuration text under its own label. The
 * text holds their public seed and the generator's version is in the label, so it binds A without the aggregator, which
 * has no model code, computing it. Nodes that train from another A are caught as any other wrong implementation is: by
 * tests. */
#define SESSION_HASH_BYTES 32
void session_frozen_hash(struct span lora_text, uint8_t ret_hash[SESSION_HASH_BYTES]);

/* True for [a-z0-9-]{1,63}: job and site ids, which also name files. */
bool session_id_valid(const char *id);

#endif
