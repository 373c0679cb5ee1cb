#include "protocol/job_plan.h"

#include "base/reader.h"
#include "protocol/quantise.h"

#include <math.h>

#define PLAN_LABEL "consilium/plan/v2"
#define PLAN_LABEL_1 "consilium/plan/v1" /* before split_words */

static int bad(struct error *err, const char *field, const char *expected)
{
    return error_set(err, ERR_CONFIG, "job plan: %s must be %s", field, expected);
}

static bool within(double v, double low, double high) /* false for NaN */
{
    return v >= low && v <= high;
}

static int check_dp(const struct job_plan *p, struct error *err)
{
    const struct plan_dp *dp = &p->dp;

    if (dp->mode == PLAN_DP_NONE) {
        if (dp->clip != 0 && !within(dp->clip, 1e-12, 1e12))
            return bad(err, "dp.clip", "0, or the bound of one record's gradient");
        if (dp->noise_multiplier != 0 || dp->sampling_rate != 0 || dp->delta != 0 || dp->target_epsilon != 0 ||
            dp->grid != 0 || dp->steps != 0)
            return bad(err, "dp", "all zero but the clip in mode none");
        return 0;
    }
    if (dp->mode != PLAN_DP_RECORD)
        return bad(err, "dp.mode", "record or none");
    if (!within(dp->clip, 1e-12, 1e12))
        return bad(err, "dp.clip", "above 0");
    /* Both or neither: without them each site derives its own from its declared records and the target. */
    if ((dp->noise_multiplier != 0 || dp->sampling_rate != 0) && !within(dp->noise_multiplier, 1e-3, 1e6))
        return bad(err, "dp.noise_multiplier", "from 0.001 to 1e6, or 0 with the sampling rate");
    if ((dp->noise_multiplier != 0 || dp->sampling_rate != 0) && !within(dp->sampling_rate, 1e-12, 1.0))
        return bad(err, "dp.sampling_rate", "in (0, 1], or 0 with the noise multiplier");
    if (!within(dp->delta, 1e-15, 0.1))
        return bad(err, "dp.delta", "from 1e-15 to 0.1");
    if (!within(dp->target_epsilon, 1e-6, 1e6))
        return bad(err, "dp.target_epsilon", "above 0");
    if (!within(dp->grid, 1.0, 0x1p60))
        return bad(err, "dp.grid", "from 1 to 2^60 steps per unit");
    if (dp->steps != (uint64_t)p->rounds * p->train.local_steps)
        return bad(err, "dp.steps", "rounds x local_steps");
    return 0;
}

static int check_aggregation(const struct plan_aggregation *a, struct error *err)
{
    if (!within(a->update_clip, 1e-12, 1e12))
        return bad(err, "aggregation.update_clip", "above 0");
    if (a->ring_bits != 32)
        return bad(err, "aggregation.ring_bits", "32");
    if (a->grid_bits < 1 || a->grid_bits > GRID_BITS_MAX)
        return bad(err, "aggregation.grid_bits", "from 1 to 30");
    if (a->optimizer.kind != SERVER_FEDAVG && a->optimizer.kind != SERVER_FEDAVGM)
        return bad(err, "aggregation.server_optimizer", "fedavg or fedavgm");
    if (!within(a->optimizer.lr, 1e-12, 1e6))
        return bad(err, "aggregation.server_lr", "above 0");
    if (!(a->optimizer.momentum >= 0.0f && a->optimizer.momentum < 1.0f))
        return bad(err, "aggregation.server_momentum", "in [0, 1)");
    if (a->optimizer.kind == SERVER_FEDAVG && a->optimizer.momentum != 0.0f)
        return bad(err, "aggregation.server_momentum", "0 with fedavg");
    return 0;
}

int job_plan_check(const struct job_plan *p, struct error *err)
{
    int rc;

    if (!site_id_valid(p->job))
        return bad(err, "job", "1 to 63 of [a-z0-9-]");
    if (p->lora_len < 1 || p->lora_len > PLAN_LORA_MAX)
        return bad(err, "lora", "present");
    if (p->split_words >= PLAN_WORDS_MAX)
        return bad(err, "split_words", "0, or the number of values of the A section");
    if (p->rounds < 1 || p->rounds > PLAN_ROUNDS_MAX)
        return bad(err, "rounds", "from 1 to 100000");
    if (p->min_sites < SECAGG_SITES_MIN || p->min_sites > SECAGG_SITES_MAX)
        return bad(err, "min_sites", "from 3 to 200");
    if (p->train.optimizer[0] == 0 || !memchr(p->train.optimizer, 0, sizeof p->train.optimizer))
        return bad(err, "train.optimizer", "a name");
    if (!within(p->train.learning_rate, 1e-12, 1e3))
        return bad(err, "train.learning_rate", "above 0");
    if (p->train.local_steps < 1 || p->train.batch < 1 || p->train.max_len < 1)
        return bad(err, "train.local_steps, batch and max_len", "1 or more");
    if (!memchr(p->train.options, 0, sizeof p->train.options))
        return bad(err, "train.options", "shorter than 2048 bytes");
    if ((rc = check_dp(p, err)) < 0 || (rc = check_aggregation(&p->aggregation, err)) < 0)
        return rc;
    if (p->c >= SECAGG_SITES_MAX || p->m == 1 || p->m > SECAGG_SITES_MAX || p->n_min > SECAGG_SITES_MAX)
        return bad(err, "secagg", "c below 200, m 0 or 2..200, n_min at most 200");
    if (p->train_deadline_s < 1 || p->stage_deadline_s < 1)
        return bad(err, "deadlines", "1 second or more");
    return 0;
}

static uint32_t f32_bits(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static float f32_of(uint32_t bits)
{
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static void encode(const struct job_plan *p, struct buffer *b)
{
    buffer_string(b, p->job);
    buffer_append(b, p->base_hash, HASH_SIZE);
    buffer_bytes(b, span_of(p->lora, p->lora_len));
    buffer_u64(b, p->split_words);
    buffer_u32(b, p->rounds);
    buffer_u32(b, p->min_sites);
    buffer_string(b, p->train.optimizer);
    buffer_f64(b, p->train.learning_rate);
    buffer_u32(b, p->train.local_steps);
    buffer_u32(b, p->train.batch);
    buffer_u32(b, p->train.max_len);
    buffer_string(b, p->train.options);
    buffer_u8(b, (uint8_t)p->dp.mode);
    buffer_f64(b, p->dp.clip);
    buffer_f64(b, p->dp.noise_multiplier);
    buffer_f64(b, p->dp.sampling_rate);
    buffer_f64(b, p->dp.delta);
    buffer_f64(b, p->dp.target_epsilon);
    buffer_f64(b, p->dp.grid);
    buffer_u64(b, p->dp.steps);
    buffer_f64(b, p->aggregation.update_clip);
    buffer_u32(b, p->aggregation.ring_bits);
    buffer_u32(b, p->aggregation.grid_bits);
    buffer_u8(b, (uint8_t)p->aggregation.optimizer.kind);
    buffer_u32(b, f32_bits(p->aggregation.optimizer.lr));
    buffer_u32(b, f32_bits(p->aggregation.optimizer.momentum));
    buffer_u32(b, p->c);
    buffer_u32(b, p->m);
    buffer_u32(b, p->n_min);
    buffer_u32(b, p->train_deadline_s);
    buffer_u32(b, p->stage_deadline_s);
    buffer_u64(b, (uint64_t)p->not_after_s);
}

/* Text that may be empty and may hold line ends, but no NUL. */
static void read_text(struct reader *in, char *out, size_t size)
{
    struct span s = reader_bytes(in, size - 1);

    if (s.len && memchr(s.ptr, 0, s.len))
        in->failed = true;
    else if (s.len)
        memcpy(out, s.ptr, s.len);
}

static bool decode(struct job_plan *p, struct span body)
{
    struct reader in = reader_of(body);

    reader_string(&in, p->job, sizeof p->job);
    reader_copy(&in, p->base_hash, HASH_SIZE);
    struct span lora = reader_bytes(&in, PLAN_LORA_MAX);
    p->lora_len = (uint32_t)lora.len;
    if (lora.len)
        memcpy(p->lora, lora.ptr, lora.len);
    p->split_words = reader_u64(&in);
    p->rounds = reader_u32(&in);
    p->min_sites = reader_u32(&in);
    reader_string(&in, p->train.optimizer, sizeof p->train.optimizer);
    p->train.learning_rate = reader_f64(&in);
    p->train.local_steps = reader_u32(&in);
    p->train.batch = reader_u32(&in);
    p->train.max_len = reader_u32(&in);
    read_text(&in, p->train.options, sizeof p->train.options);
    p->dp.mode = (enum plan_dp_mode)reader_u8(&in);
    p->dp.clip = reader_f64(&in);
    p->dp.noise_multiplier = reader_f64(&in);
    p->dp.sampling_rate = reader_f64(&in);
    p->dp.delta = reader_f64(&in);
    p->dp.target_epsilon = reader_f64(&in);
    p->dp.grid = reader_f64(&in);
    p->dp.steps = reader_u64(&in);
    p->aggregation.update_clip = reader_f64(&in);
    p->aggregation.ring_bits = reader_u32(&in);
    p->aggregation.grid_bits = reader_u32(&in);
    p->aggregation.optimizer.kind = (enum server_optimizer_kind)reader_u8(&in);
    p->aggregation.optimizer.lr = f32_of(reader_u32(&in));
    p->aggregation.optimizer.momentum = f32_of(reader_u32(&in));
    p->c = reader_u32(&in);
    p->m = reader_u32(&in);
    p->n_min = reader_u32(&in);
    p->train_deadline_s = reader_u32(&in);
    p->stage_deadline_s = reader_u32(&in);
    p->not_after_s = (int64_t)reader_u64(&in);
    return reader_done(&in);
}

int job_plan_sign(struct job_plan *p, const struct sign_key *author, struct buffer *out, struct error *err)
{
    struct buffer body;
    uint8_t signature[SIGN_SIZE];
    int rc = job_plan_check(p, err);

    if (rc < 0)
        return rc;
    buffer_init(&body, PLAN_BYTES_MAX);
    encode(p, &body);
    struct span part = buffer_span(&body);
    if (buffer_ok(&body)) {
        hash_labelled(PLAN_LABEL, &part, 1, p->hash);
        memcpy(p->author, author->public_key, SIGN_PUBLIC_SIZE);
        sign_parts(author, PLAN_LABEL, &part, 1, signature);
        buffer_append(out, body.data, body.len);
        buffer_append(out, p->author, SIGN_PUBLIC_SIZE);
        buffer_append(out, signature, SIGN_SIZE);
    }
    rc = buffer_ok(&body) && buffer_ok(out) ? 0 : error_set(err, ERR_RESOURCES, "job plan: does not fit");
    buffer_release(&body);
    return rc;
}

int job_plan_open(struct job_plan *ret_p, struct span signed_bytes, const struct roster *roster, struct error *err)
{
    const size_t tail = SIGN_PUBLIC_SIZE + SIGN_SIZE;
    struct job_plan p = {0};
    struct error why = {0};

    if (signed_bytes.len <= tail || signed_bytes.len > PLAN_BYTES_MAX + tail)
        return error_set(err, ERR_INTEGRITY, "job plan: %zu bytes are no signed plan", signed_bytes.len);
    struct span body = span_of(signed_bytes.ptr, signed_bytes.len - tail);
    memcpy(p.author, body.ptr + body.len, SIGN_PUBLIC_SIZE);
    if (!roster_is_author(roster, p.author))
        return error_set(err, ERR_POLICY, "job plan: its author's key is not in roster serial %llu",
                         (unsigned long long)roster->serial);
    if (sign_verify(p.author, PLAN_LABEL, &body, 1, body.ptr + body.len + SIGN_PUBLIC_SIZE) < 0) {
        if (sign_verify(p.author, PLAN_LABEL_1, &body, 1, body.ptr + body.len + SIGN_PUBLIC_SIZE) == 0)
            return error_set(err, ERR_INTEGRITY,
                             "job plan: signed by a version of consilium before plans named the halves of an adapter; "
                             "submit the job again");
        return error_set(err, ERR_INTEGRITY, "job plan: the author's signature does not match the plan");
    }
    if (!decode(&p, body))
        return error_set(err, ERR_INTEGRITY, "job plan: malformed, or written by another version");
    if (job_plan_check(&p, &why) < 0)
        return error_set(err, ERR_INTEGRITY, "%s", why.message);
    hash_labelled(PLAN_LABEL, &body, 1, p.hash);
    *ret_p = p;
    return 0;
}

int job_plan_segment(const struct job_plan *p, uint32_t round, uint64_t words, struct model_segment *ret_segment,
                     struct error *err)
{
    const uint64_t split = p->split_words;

    if (words < 1 || (split > 0 && split >= words))
        return error_set(err, ERR_CONFIG, "job plan: split_words is %llu, the model's state has %llu values",
                         (unsigned long long)split, (unsigned long long)words);
    if (split == 0)
        *ret_segment = (struct model_segment){0, words};
    else if (round % 2 == 1)
        *ret_segment = (struct model_segment){split, words - split};
    else
        *ret_segment = (struct model_segment){0, split};
    return 0;
}

uint64_t job_plan_vector_max(const struct job_plan *p, uint64_t words)
{
    const uint64_t split = p->split_words < words ? p->split_words : 0;

    return split > words - split ? split : words - split;
}

struct model_basis job_plan_basis(const struct job_plan *p, const uint8_t frozen_hash[HASH_SIZE])
{
    struct model_basis basis = {.lora_config = span_of(p->lora, p->lora_len)};

    memcpy(basis.base_hash, p->base_hash, HASH_SIZE);
    memcpy(basis.frozen_hash, frozen_hash, HASH_SIZE);
    return basis;
}
