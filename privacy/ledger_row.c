#include "privacy/ledger_row.h"

#include "crypto/hash.h"

#define ROW_VERSION 1

void ledger_record_encode(const struct ledger_record *r, struct buffer *out)
{
    const struct ledger_row *row = &r->row;
    buffer_u8(out, ROW_VERSION);
    buffer_u8(out, (uint8_t)row->kind);
    buffer_u64(out, row->sequence);
    buffer_u64(out, (uint64_t)row->wall_ms);
    switch (row->kind) {
    case LEDGER_GENESIS:
        buffer_string(out, r->site);
        buffer_f64(out, row->epsilon);
        buffer_f64(out, r->delta);
        buffer_f64(out, r->order);
        break;
    case LEDGER_BUDGET:
        buffer_f64(out, row->epsilon);
        break;
    case LEDGER_RESERVED:
        buffer_string(out, row->job);
        buffer_append(out, r->job_hash, DP_HASH_SIZE);
        buffer_append(out, r->dataset, DP_HASH_SIZE);
        buffer_append(out, r->binary_hash, DP_HASH_SIZE);
        dp_plan_encode(&row->plan, out);
        buffer_u64(out, row->first_step);
        buffer_u32(out, row->steps);
        buffer_f64(out, row->rdp);
        for (size_t i = 0; i < RDP_ORDERS; i++)
            buffer_f64(out, r->curve[i]);
        break;
    case LEDGER_RELEASED:
        buffer_u64(out, row->reservation);
        buffer_append(out, row->released, DP_HASH_SIZE);
        break;
    case LEDGER_BURNT:
        buffer_u64(out, row->reservation);
        buffer_string(out, row->reason);
        break;
    }
}

int ledger_record_decode(struct span body, struct ledger_record *ret_record)
{
    struct reader in = reader_of(body);
    struct ledger_record r = {0};
    struct ledger_row *row = &r.row;
    bool version = reader_u8(&in) == ROW_VERSION;
    uint8_t kind = reader_u8(&in);
    row->sequence = reader_u64(&in);
    row->wall_ms = (int64_t)reader_u64(&in);
    if (!version || kind < LEDGER_GENESIS || kind > LEDGER_BURNT)
        return ERR_INTEGRITY;
    row->kind = (enum ledger_kind)kind;
    switch (row->kind) {
    case LEDGER_GENESIS:
        reader_string(&in, r.site, sizeof r.site);
        row->epsilon = reader_f64(&in);
        r.delta = reader_f64(&in);
        r.order = reader_f64(&in);
        break;
    case LEDGER_BUDGET:
        row->epsilon = reader_f64(&in);
        break;
    case LEDGER_RESERVED:
        reader_string(&in, row->job, sizeof row->job);
        reader_copy(&in, r.job_hash, DP_HASH_SIZE);
        reader_copy(&in, r.dataset, DP_HASH_SIZE);
        reader_copy(&in, r.binary_hash, DP_HASH_SIZE);
        dp_plan_decode(&in, &row->plan);
        row->first_step = reader_u64(&in);
        row->steps = reader_u32(&in);
        row->rdp = reader_f64(&in);
        for (size_t i = 0; i < RDP_ORDERS; i++)
            r.curve[i] = reader_f64(&in);
        break;
    case LEDGER_RELEASED:
        row->reservation = reader_u64(&in);
        reader_copy(&in, row->released, DP_HASH_SIZE);
        break;
    case LEDGER_BURNT:
        row->reservation = reader_u64(&in);
        reader_string(&in, row->reason, sizeof row->reason);
        break;
    }
    if (!reader_done(&in))
        return ERR_INTEGRITY;
    *ret_record = r;
    return 0;
}

void ledger_record_hash(const uint8_t previous[DP_HASH_SIZE], struct span body, uint8_t out[DP_HASH_SIZE])
{
    struct span parts[2] = {span_of(previous, DP_HASH_SIZE), body};
    hash_labelled("consilium/ledger", parts, 2, out);
}
