#include "protocol/session.h"

#include "crypto/hash.h"

#define PAYLOAD_BYTES_MAX ((size_t)32 << 20)

bool session_id_valid(const char *id)
{
    size_t n = strlen(id);

    if (n < 1 || n >= SESSION_JOB_SIZE)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (!((id[i] >= 'a' && id[i] <= 'z') || (id[i] >= '0' && id[i] <= '9') || id[i] == '-'))
            return false;
    }
    return true;
}

void session_event_encode(const struct session_event *event, struct buffer *out)
{
    buffer_u64(out, event->cursor.epoch);
    buffer_u64(out, event->cursor.sequence);
    buffer_u8(out, (uint8_t)event->kind);
    buffer_string(out, event->job);
    buffer_u64(out, event->round);
    buffer_u32(out, event->attempt);
    buffer_bytes(out, event->payload);
}

int session_event_decode(struct span bytes, struct session_event *ret_event, struct error *err)
{
    struct reader r = reader_of(bytes);
    struct session_event event = {0};
    uint8_t kind;

    event.cursor.epoch = reader_u64(&r);
    event.cursor.sequence = reader_u64(&r);
    kind = reader_u8(&r);
    reader_string(&r, event.job, sizeof event.job);
    event.round = reader_u64(&r);
    event.attempt = reader_u32(&r);
    event.payload = reader_bytes(&r, PAYLOAD_BYTES_MAX);
    if (!reader_done(&r) || kind > SESSION_DONE || !session_id_valid(event.job))
        return error_set(err, ERR_INTEGRITY, "malformed event from the aggregator (%zu bytes)", bytes.len);
    event.kind = (enum session_event_kind)kind;
    *ret_event = event;
    return 0;
}

void session_message_encode(const struct session_message *message, struct buffer *out)
{
    buffer_u8(out, (uint8_t)message->stage);
    buffer_string(out, message->job);
    buffer_u64(out, message->round);
    buffer_u32(out, message->attempt);
    buffer_bytes(out, message->payload);
}

int session_message_decode(struct span bytes, struct session_message *ret_message, struct error *err)
{
    struct reader r = reader_of(bytes);
    struct session_message message = {0};
    uint8_t stage = reader_u8(&r);

    reader_string(&r, message.job, sizeof message.job);
    message.round = reader_u64(&r);
    message.attempt = reader_u32(&r);
    message.payload = reader_bytes(&r, PAYLOAD_BYTES_MAX);
    if (!reader_done(&r) || stage < SESSION_M1_ADVERTISE || stage > SESSION_WILLING || !session_id_valid(message.job))
        return error_set(err, ERR_INTEGRITY, "malformed message from a site (%zu bytes)", bytes.len);
    message.stage = (enum session_stage)stage;
    *ret_message = message;
    return 0;
}

void session_frozen_hash(struct span lora_text, uint8_t ret_hash[SESSION_HASH_BYTES])
{
    hash_labelled("consilium/frozen-from-seed/v1", &lora_text, 1, ret_hash);
}
