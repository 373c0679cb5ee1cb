#include "privacy/ledger.h"

#include "privacy/ledger_row.h"
#include "base/file.h"
#include "runtime/store.h"

#include <inttypes.h>
#include <math.h>

static const char *const migrations[] = {
    "CREATE TABLE ledger(sequence INTEGER PRIMARY KEY, body BLOB NOT NULL, hash BLOB NOT NULL) STRICT;"
    "CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'append only'); END;"
    "CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'append only'); END"};

struct job {
    char name[LEDGER_NAME_SIZE];
    uint8_t plan_hash[DP_HASH_SIZE];
    uint64_t next_step, steps;
    double rdp, curve[RDP_ORDERS];
    uint64_t counts[3]; /* open, released, burnt */
};

struct reservation {
    uint64_t sequence;
    size_t job;
    enum ledger_kind state;
    uint8_t released[DP_HASH_SIZE];
};

/* What the rows up to `head` add up to. Rebuilt from the rows alone; never stored. */
struct totals {
    struct ledger_head head;
    uint64_t rows;
    char site[LEDGER_NAME_SIZE];
    double epsilon, delta, order;
    double rdp, curve[RDP_ORDERS];
    uint64_t steps;
    struct job *jobs;
    size_t jobs_count;
    struct reservation *reservations;
    size_t reservations_count;
};

struct ledger {
    struct store *store;
    const struct clock *clock;
    double epsilon; /* as opened; the rows may say less */
    bool read_only;
    struct totals totals;
};

static void totals_release(struct totals *t)
{
    free(t->jobs);
    free(t->reservations);
    *t = (struct totals){0};
}

static size_t find_job(const struct totals *t, const char *name)
{
    for (size_t i = 0; i < t->jobs_count; i++)
        if (strcmp(t->jobs[i].name, name) == 0)
            return i;
    return SIZE_MAX;
}

static struct reservation *find_reservation(struct totals *t, uint64_t sequence)
{
    for (size_t i = t->reservations_count; i-- > 0;)
        if (t->reservations[i].sequence == sequence)
            return &t->reservations[i];
    return NULL;
}

static double budget(const struct ledger *l)
{
    return fmin(l->totals.epsilon, l->epsilon);
}

static double rdp_budget(const struct ledger *l)
{
    return rdp_from_epsilon(l->totals.order, budget(l), l->totals.delta);
}

/* Room for one more element, doubled in steps; NULL when memory ran out. */
static void *grow(void *array, size_t count, size_t element)
{
    if (count & (count - 1)) /* capacities are powers of two */
        return array;
    size_t capacity = count ? count * 2 : 1, bytes;
    return __builtin_mul_overflow(capacity, element, &bytes) ? NULL : realloc(array, bytes);
}

static int row_error(uint64_t sequence, const char *what, struct error *err)
{
    return error_set(err, ERR_INTEGRITY,
                     "privacy ledger: row %" PRIu64 ": %s; restore the ledger from a backup, nothing may be released",
                     sequence, what);
}

static int out_of_memory(struct error *err)
{
    return error_set(err, ERR_RESOURCES, "privacy ledger: out of memory");
}

static bool close_to(double a, double b)
{
    return fabs(a - b) <= 1e-9 * fabs(b) + 1e-300;
}

static int apply_reserved(struct totals *t, const struct ledger_record *r, struct error *err)
{
    const struct ledger_row *row = &r->row;
    uint8_t plan_hash[DP_HASH_SIZE];
    if (dp_plan_check_ranges(&row->plan, NULL) < 0 || row->plan.mode == DP_NONE || row->steps == 0)
        return row_error(row->sequence, "parameters out of range", err);
    double rdp = row->steps * rdp_step(row->plan.q, row->plan.z, t->order);
    if (!isfinite(row->rdp) || !close_to(row->rdp, rdp))
        return row_error(row->sequence, "the spent budget does not follow from the parameters", err);
    void *grown = grow(t->reservations, t->reservations_count, sizeof *t->reservations);
    if (!grown)
        return out_of_memory(err);
    t->reservations = grown;
    dp_plan_hash(&row->plan, plan_hash);
    size_t index = find_job(t, row->job);
    if (index == SIZE_MAX) {
        if (!(grown = grow(t->jobs, t->jobs_count, sizeof *t->jobs)))
            return out_of_memory(err);
        t->jobs = grown;
        index = t->jobs_count++;
        memset(&t->jobs[index], 0, sizeof *t->jobs);
        memcpy(t->jobs[index].name, row->job, sizeof row->job);
        memcpy(t->jobs[index].plan_hash, plan_hash, sizeof plan_hash);
    }
    struct job *job = &t->jobs[index];
    if (row->first_step < job->next_step || memcmp(job->plan_hash, plan_hash, sizeof plan_hash) != 0)
        return row_error(row->sequence, "a repeated step or a changed plan", err);
    job->next_step = row->first_step + row->steps;
    job->steps += row->steps;
    job->rdp += row->rdp;
    job->counts[0]++;
    t->rdp += row->rdp;
    t->steps += row->steps;
    for (size_t i = 0; i < RDP_ORDERS; i++) {
        job->curve[i] += r->curve[i];
        t->curve[i] += r->curve[i];
    }
    t->reservations[t->reservations_count++] = (struct reservation){row->sequence, index, LEDGER_RESERVED, {0}};
    return 0;
}

static int apply_end(struct totals *t, const struct ledger_row *row, struct error *err)
{
    struct reservation *r = find_reservation(t, row->reservation);
    if (!r || r->state != LEDGER_RESERVED)
        return row_error(row->sequence, "ends a reservation that is not open", err);
    r->state = row->kind;
    memcpy(r->released, row->released, DP_HASH_SIZE);
    t->jobs[r->job].counts[0]--;
    t->jobs[r->job].counts[row->kind == LEDGER_RELEASED ? 1 : 2]++;
    return 0;
}

/* Adds one row whose hash was checked. */
static int apply(struct totals *t, const struct ledger_record *r, const uint8_t hash[DP_HASH_SIZE], struct error *err)
{
    const struct ledger_row *row = &r->row;
    int rc = 0;
    if ((row->kind == LEDGER_GENESIS) != (t->rows == 0))
        return row_error(row->sequence, "not where a first row belongs", err);
    switch (row->kind) {
    case LEDGER_GENESIS:
        memcpy(t->site, r->site, sizeof t->site);
        t->delta = r->delta;
        t->order = r->order;
        t->epsilon = row->epsilon;
        if (!(t->delta > 0 && t->delta < 1 && t->order > 1.01 && t->order <= 4096 && t->epsilon > 0))
            rc = row_error(row->sequence, "budget out of range", err);
        break;
    case LEDGER_BUDGET:
        t->epsilon = row->epsilon;
        if (!(t->epsilon > 0 && t->epsilon <= 1000))
            rc = row_error(row->sequence, "budget out of range", err);
        break;
    case LEDGER_RESERVED:
        rc = apply_reserved(t, r, err);
        break;
    case LEDGER_RELEASED:
    case LEDGER_BURNT:
        rc = apply_end(t, row, err);
        break;
    }
    if (rc < 0)
        return rc;
    t->rows++;
    t->head.sequence = row->sequence;
    memcpy(t->head.hash, hash, DP_HASH_SIZE);
    return 0;
}

/* One stored row: its place, its chain hash, its encoding. */
static int check_row(const struct totals *t, const struct store_query *q, struct ledger_record *ret_record,
                     uint8_t ret_hash[DP_HASH_SIZE], struct error *err)
{
    static const uint8_t zero[DP_HASH_SIZE];
    uint64_t sequence = (uint64_t)store_i64(q, 0), expected = t->rows ? t->head.sequence + 1 : 0;
    struct span body = store_blob(q, 1), stored = store_blob(q, 2);
    uint8_t hash[DP_HASH_SIZE];
    if (sequence != expected)
        return row_error(expected, "missing", err);
    ledger_record_hash(t->rows ? t->head.hash : zero, body, hash);
    if (stored.len != DP_HASH_SIZE || memcmp(stored.ptr, hash, DP_HASH_SIZE) != 0)
        return row_error(sequence, "its hash does not follow from the row before: it was changed", err);
    if (ledger_record_decode(body, ret_record) < 0 || ret_record->row.sequence != sequence)
        return row_error(sequence, "malformed", err);
    memcpy(ret_hash, hash, DP_HASH_SIZE);
    return 0;
}

/* Brings totals up to the last row in the database. */
static int catch_up(struct store *store, struct totals *t, struct error *err)
{
    struct store_query q = store_query(store, "SELECT hash FROM ledger WHERE sequence = ?");
    int rc;
    if (t->rows > 0) { /* the row that we know must still be there: a file swapped underneath is seen */
        store_bind_i64(&q, 1, (int64_t)t->head.sequence);
        rc = store_row(&q, err);
        if (rc >= 0) {
            struct span hash = rc > 0 ? store_blob(&q, 0) : span_of(NULL, 0);
            bool same = hash.len == DP_HASH_SIZE && memcmp(hash.ptr, t->head.hash, DP_HASH_SIZE) == 0;
            rc = same ? 0 : row_error(t->head.sequence, "gone or replaced while in use", err);
        }
        store_end(&q);
        if (rc < 0)
            return rc;
    }
    q = store_query(store, "SELECT sequence, body, hash FROM ledger WHERE sequence >= ? ORDER BY sequence");
    store_bind_i64(&q, 1, t->rows ? (int64_t)t->head.sequence + 1 : INT64_MIN);
    while ((rc = store_row(&q, err)) > 0) {
        struct ledger_record record;
        uint8_t hash[DP_HASH_SIZE];
        rc = check_row(t, &q, &record, hash, err);
        if (rc == 0)
            rc = apply(t, &record, hash, err);
        if (rc < 0)
            break;
    }
    store_end(&q);
    return rc;
}

/* Inside a transaction that caught up: inserts, commits (durable), then adds it to the totals. Always ends it. */
static int append(struct ledger *l, struct ledger_record *r, struct error *err)
{
    static const uint8_t zero[DP_HASH_SIZE];
    struct totals *t = &l->totals;
    struct buffer body;
    uint8_t hash[DP_HASH_SIZE];
    r->row.sequence = t->rows ? t->head.sequence + 1 : 0;
    r->row.wall_ms = clock_wall_ms(l->clock);
    buffer_init(&body, LEDGER_BODY_MAX);
    ledger_record_encode(r, &body);
    int rc = buffer_ok(&body) ? 0 : out_of_memory(err);
    if (rc == 0) {
        ledger_record_hash(t->rows ? t->head.hash : zero, buffer_span(&body), hash);
        struct store_query q = store_query(l->store, "INSERT INTO ledger(sequence, body, hash) VALUES(?, ?, ?)");
        store_bind_i64(&q, 1, (int64_t)r->row.sequence);
        store_bind_blob(&q, 2, buffer_span(&body));
        store_bind_blob(&q, 3, span_of(hash, sizeof hash));
        rc = store_run(&q, err);
    }
    buffer_release(&body);
    if (rc < 0)
        store_rollback(l->store);
    else
        rc = store_commit(l->store, err);
    return rc < 0 ? rc : apply(t, r, hash, err);
}

static int begin(struct ledger *l, struct error *err)
{
    assert(!l->read_only || l->totals.rows == 0); /* only to read, once it is open */
    int rc = store_begin(l->store, err);
    if (rc == 0 && (rc = catch_up(l->store, &l->totals, err)) < 0)
        store_rollback(l->store);
    return rc;
}

/* The order of the grid that admits the most of the expected steps (or of small Gaussian steps) within the budget. */
static double choose_order(const struct ledger_options *o)
{
    double best = 0, order = 0;
    for (size_t i = 0; i < RDP_ORDERS; i++) {
        double alpha = rdp_order(i), budget = rdp_from_epsilon(alpha, o->epsilon, o->delta);
        if (budget <= 0 || alpha <= 1.01)
            continue;
        double step = o->expected ? rdp_step(o->expected->q, o->expected->z, alpha) : alpha;
        if (step > 0 && isfinite(step) && budget / step > best) {
            best = budget / step;
            order = alpha;
        }
    }
    return order;
}

static int create(struct ledger *l, const struct ledger_options *o, struct error *err)
{
    struct ledger_record r = {.row = {.kind = LEDGER_GENESIS, .epsilon = o->epsilon}, .delta = o->delta};
    r.order = o->order != 0 ? o->order : choose_order(o);
    snprintf(r.site, sizeof r.site, "%s", o->site);
    if (!(r.order > 1.01 && r.order <= 4096) || rdp_from_epsilon(r.order, o->epsilon, o->delta) <= 0) {
        store_rollback(l->store);
        return error_set(err, ERR_POLICY,
                         "privacy ledger: a budget of epsilon %g at delta %g admits no release: raise the budget",
                         o->epsilon, o->delta);
    }
    return append(l, &r, err);
}

/* The budget of the site's policy against the ledger's; a change is booked, unless read only. Ends the transaction. */
static int reconcile(struct ledger *l, const struct ledger_options *o, struct error *err)
{
    const struct totals *t = &l->totals;
    int rc = 0;
    if (strcmp(t->site, o->site) != 0)
        rc = error_set(err, ERR_CONFIG, "privacy ledger: belongs to site %s, not %s", t->site, o->site);
    else if (t->delta != o->delta)
        rc = error_set(err, ERR_CONFIG, "privacy ledger: delta %g was fixed when it was created; the policy says %g",
                       t->delta, o->delta);
    if (rc == 0 && t->epsilon != o->epsilon && !o->read_only) {
        struct ledger_record r = {.row = {.kind = LEDGER_BUDGET, .epsilon = o->epsilon}};
        return append(l, &r, err);
    }
    store_rollback(l->store);
    return rc;
}

static int check_options(const struct ledger_options *o, struct error *err)
{
    if (!o->site || !*o->site || strlen(o->site) >= LEDGER_NAME_SIZE)
        return error_set(err, ERR_CONFIG, "privacy ledger: expected a site name of 1 to %d bytes",
                         LEDGER_NAME_SIZE - 1);
    if (!(o->epsilon > 0 && o->epsilon <= 1000))
        return error_set(err, ERR_CONFIG, "privacy ledger: budget epsilon %g: expected above 0 and at most 1000",
                         o->epsilon);
    if (!(o->delta > 0 && o->delta < 1))
        return error_set(err, ERR_CONFIG, "privacy ledger: delta %g: expected between 0 and 1", o->delta);
    return o->expected ? dp_plan_check_ranges(o->expected, err) : 0;
}

int ledger_open(struct ledger **ret_ledger, const char *path, const struct ledger_options *o, struct error *err)
{
    bool must_exist = o->must_exist || o->read_only;
    int rc = check_options(o, err);
    if (rc < 0)
        return rc;
    if (must_exist && !file_exists(path))
        return error_set(err, ERR_NOT_FOUND,
                         "privacy ledger: %s is missing; restore it, a new one would forget what is "
                         "spent",
                         path);
    struct ledger *l = calloc(1, sizeof *l);
    if (!l)
        return out_of_memory(err);
    l->clock = o->clock;
    l->epsilon = o->epsilon;
    l->read_only = o->read_only;
    rc = store_open(&l->store, path, migrations, ARRAY_LEN(migrations), err);
    if (rc == 0)
        rc = begin(l, err);
    if (rc == 0 && l->totals.rows == 0 && must_exist) {
        store_rollback(l->store);
        rc = error_set(err, ERR_INTEGRITY, "privacy ledger: %s is empty; restore it from a backup", path);
    } else if (rc == 0) {
        rc = l->totals.rows == 0 ? create(l, o, err) : reconcile(l, o, err);
    }
    if (rc < 0) {
        ledger_close(l);
        return rc;
    }
    *ret_ledger = l;
    return 0;
}

void ledger_close(struct ledger *l)
{
    if (!l)
        return;
    store_close(l->store);
    totals_release(&l->totals);
    free(l);
}

/* Would `rdp` more fit? The message has the three figures. */
static int check_budget(const struct ledger *l, double rdp, double *ret_epsilon, struct error *err)
{
    const struct totals *t = &l->totals;
    double after = t->rdp + rdp, epsilon = rdp_to_epsilon(t->order, after, t->delta);
    *ret_epsilon = epsilon;
    if (isfinite(after) && after <= rdp_budget(l) * (1 + 1e-12))
        return 0;
    return error_set(
        err, ERR_POLICY,
        "privacy budget: spent epsilon %.4f, with these steps it would be %.4f, the budget is %.4f (delta %g, "
        "order %g): the site's policy allows no further release",
        t->rdp > 0 ? rdp_to_epsilon(t->order, t->rdp, t->delta) : 0, epsilon, budget(l), t->delta, t->order);
}

static int check_request(const struct totals *t, const struct ledger_request *q, struct error *err)
{
    uint8_t plan_hash[DP_HASH_SIZE];
    size_t len = strlen(q->job);
    if (len == 0 || len >= LEDGER_NAME_SIZE)
        return error_set(err, ERR_CONFIG, "privacy ledger: expected a job name of 1 to %d bytes", LEDGER_NAME_SIZE - 1);
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)q->job[i] < 0x20 || q->job[i] == 0x7f)
            return error_set(err, ERR_CONFIG, "privacy ledger: the job name has a control character");
    if (q->plan->mode == DP_NONE)
        return error_set(err, ERR_POLICY, "privacy ledger: job %s asks for training without differential privacy",
                         q->job);
    int rc = dp_plan_check_ranges(q->plan, err);
    if (rc < 0)
        return rc;
    uint64_t all = dp_plan_steps(q->plan);
    if (q->steps == 0 || q->first_step >= all || q->steps > all - q->first_step)
        return error_set(err, ERR_CONFIG,
                         "privacy ledger: steps %" PRIu64 " + %" PRIu32 " are not among the plan's %" PRIu64,
                         q->first_step, q->steps, all);
    size_t index = find_job(t, q->job);
    if (index == SIZE_MAX)
        return 0;
    dp_plan_hash(q->plan, plan_hash);
    if (memcmp(plan_hash, t->jobs[index].plan_hash, DP_HASH_SIZE) != 0)
        return error_set(err, ERR_CONFIG, "privacy ledger: job %s had another plan before; a new plan needs a new job",
                         q->job);
    if (q->first_step < t->jobs[index].next_step)
        return error_set(err, ERR_POLICY,
                         "privacy ledger: job %s step %" PRIu64 " was spent already; the next is %" PRIu64, q->job,
                         q->first_step, t->jobs[index].next_step);
    return 0;
}

int ledger_reserve(struct ledger *l, const struct ledger_request *q, uint64_t *ret_sequence, struct error *err)
{
    double epsilon;
    int rc = begin(l, err);
    if (rc < 0)
        return rc;
    struct ledger_record r = {.row = {.kind = LEDGER_RESERVED, .first_step = q->first_step, .steps = q->steps}};
    rc = check_request(&l->totals, q, err);
    if (rc == 0) {
        r.row.rdp = q->steps * rdp_step(q->plan->q, q->plan->z, l->totals.order);
        rc = check_budget(l, r.row.rdp, &epsilon, err);
    }
    if (rc < 0) {
        store_rollback(l->store);
        return rc;
    }
    r.row.plan = *q->plan;
    snprintf(r.row.job, sizeof r.row.job, "%s", q->job);
    memcpy(r.job_hash, q->job_hash, DP_HASH_SIZE);
    memcpy(r.dataset, q->dataset, DP_HASH_SIZE);
    memcpy(r.binary_hash, q->binary_hash, DP_HASH_SIZE);
    rdp_curve(q->plan->q, q->plan->z, q->steps, r.curve);
    rc = append(l, &r, err);
    if (rc == 0)
        *ret_sequence = r.row.sequence;
    return rc;
}

int ledger_preview(struct ledger *l, const struct dp_plan *plan, uint64_t steps, double *ret_epsilon, struct error *err)
{
    int rc = catch_up(l->store, &l->totals, err);
    if (rc < 0)
        return rc;
    if (plan->mode == DP_NONE) {
        *ret_epsilon = INFINITY;
        return error_set(err, ERR_POLICY, "privacy budget: training without differential privacy");
    }
    rc = dp_plan_check_ranges(plan, err);
    if (rc < 0)
        return rc;
    return check_budget(l, (double)steps * rdp_step(plan->q, plan->z, l->totals.order), ret_epsilon, err);
}

/* RELEASED or BURNT for a reservation that is open. */
static int end_reservation(struct ledger *l, struct ledger_record *r, struct error *err)
{
    int rc = begin(l, err);
    if (rc < 0)
        return rc;
    struct reservation *found = find_reservation(&l->totals, r->row.reservation);
    if (found && found->state == LEDGER_RESERVED)
        return append(l, r, err);
    store_rollback(l->store);
    if (found && found->state == r->row.kind && memcmp(found->released, r->row.released, DP_HASH_SIZE) == 0)
        return 0; /* said twice */
    return error_set(err, ERR_POLICY, "privacy ledger: reservation %" PRIu64 " %s", r->row.reservation,
                     !found                            ? "does not exist"
                     : found->state == LEDGER_RELEASED ? "was released already, with other contents"
                                                       : "was burnt: what it produced may not be released");
}

int ledger_release(struct ledger *l, uint64_t reservation, const uint8_t released[DP_HASH_SIZE], struct error *err)
{
    struct ledger_record r = {.row = {.kind = LEDGER_RELEASED, .reservation = reservation}};
    memcpy(r.row.released, released, DP_HASH_SIZE);
    return end_reservation(l, &r, err);
}

int ledger_burn(struct ledger *l, uint64_t reservation, const char *reason, struct error *err)
{
    struct ledger_record r = {.row = {.kind = LEDGER_BURNT, .reservation = reservation}};
    snprintf(r.row.reason, sizeof r.row.reason, "%s", *reason ? reason : "unknown");
    for (char *at = r.row.reason; *at; at++)
        if ((unsigned char)*at < 0x20 || *at == 0x7f)
            *at = '?';
    return end_reservation(l, &r, err);
}

int ledger_burn_open(struct ledger *l, const char *reason, uint32_t *ret_count, struct error *err)
{
    uint32_t count = 0;
    int rc = catch_up(l->store, &l->totals, err);
    for (size_t i = 0; rc == 0 && i < l->totals.reservations_count; i++)
        if (l->totals.reservations[i].state == LEDGER_RESERVED) {
            rc = ledger_burn(l, l->totals.reservations[i].sequence, reason, err);
            count++;
        }
    if (rc == 0)
        *ret_count = count;
    return rc;
}

int ledger_spent(struct ledger *l, const char *job_name, struct ledger_spent *ret_spent, struct error *err)
{
    const struct totals *t = &l->totals;
    double orders[RDP_ORDERS], curve_order;
    int rc = catch_up(l->store, &l->totals, err);
    if (rc < 0)
        return rc;
    struct ledger_spent s = {.budget = budget(l), .delta = t->delta, .order = t->order, .rdp_budget = rdp_budget(l)};
    const double *curve = t->curve;
    for (size_t i = 0; i < t->jobs_count; i++) {
        if (job_name && strcmp(t->jobs[i].name, job_name) != 0)
            continue;
        s.reserved += t->jobs[i].counts[0];
        s.released += t->jobs[i].counts[1];
        s.burnt += t->jobs[i].counts[2];
        s.rdp += t->jobs[i].rdp;
        s.steps += t->jobs[i].steps;
        curve = job_name ? t->jobs[i].curve : curve;
    }
    s.rdp = job_name ? s.rdp : t->rdp;
    if (s.steps > 0) {
        for (size_t i = 0; i < RDP_ORDERS; i++)
            orders[i] = rdp_order(i);
        s.epsilon = rdp_to_epsilon(t->order, s.rdp, t->delta);
        s.epsilon_curve = rdp_curve_epsilon(orders, curve, RDP_ORDERS, t->delta, &curve_order);
    }
    *ret_spent = s;
    return 0;
}

int ledger_head(struct ledger *l, struct ledger_head *ret_head, struct error *err)
{
    int rc = catch_up(l->store, &l->totals, err);
    if (rc == 0)
        *ret_head = l->totals.head;
    return rc;
}

int ledger_expect(struct ledger *l, const struct ledger_head *witnessed, struct error *err)
{
    int rc = catch_up(l->store, &l->totals, err);
    if (rc < 0)
        return rc;
    struct store_query q = store_query(l->store, "SELECT hash FROM ledger WHERE sequence = ?");
    store_bind_i64(&q, 1, (int64_t)witnessed->sequence);
    rc = store_row(&q, err);
    if (rc < 0)
        return rc;
    struct span hash = rc > 0 ? store_blob(&q, 0) : span_of(NULL, 0);
    bool same = hash.len == DP_HASH_SIZE && memcmp(hash.ptr, witnessed->hash, DP_HASH_SIZE) == 0;
    store_end(&q);
    if (same)
        return 0;
    return error_set(err, ERR_INTEGRITY,
                     "privacy ledger: a peer saw row %" PRIu64
                     "%s: this is an old copy or a clone; restore the newest one",
                     witnessed->sequence, rc > 0 ? " with another hash" : ", which is missing here");
}

int ledger_next_step(struct ledger *l, const char *job, uint64_t *ret_step, struct error *err)
{
    int rc = catch_up(l->store, &l->totals, err);
    if (rc < 0)
        return rc;
    size_t index = find_job(&l->totals, job);
    *ret_step = index == SIZE_MAX ? 0 : l->totals.jobs[index].next_step;
    return 0;
}

int ledger_verify(struct ledger *l, struct error *err)
{
    struct totals t = {0};
    int rc = store_check(l->store, err);
    if (rc == 0)
        rc = catch_up(l->store, &t, err);
    if (rc == 0 && t.rows == 0)
        rc = row_error(0, "missing", err);
    if (rc == 0 && (t.head.sequence < l->totals.head.sequence))
        rc = row_error(l->totals.head.sequence, "gone while in use", err);
    totals_release(&t);
    return rc;
}

int ledger_each(struct ledger *l, uint64_t from, int (*visit)(void *ctx, const struct ledger_row *row), void *ctx,
                struct error *err)
{
    struct store_query q =
        store_query(l->store, "SELECT sequence, body, hash FROM ledger WHERE sequence >= ? ORDER BY sequence LIMIT -1");
    int rc;
    store_bind_i64(&q, 1, (int64_t)from);
    while ((rc = store_row(&q, err)) > 0) {
        struct ledger_record record;
        struct span hash = store_blob(&q, 2);
        if (hash.len != DP_HASH_SIZE || ledger_record_decode(store_blob(&q, 1), &record) < 0) {
            rc = row_error((uint64_t)store_i64(&q, 0), "malformed", err);
            break;
        }
        memcpy(record.row.hash, hash.ptr, DP_HASH_SIZE);
        if ((rc = visit(ctx, &record.row)) != 0)
            break;
    }
    store_end(&q);
    return rc;
}
