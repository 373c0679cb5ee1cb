/* Uploads and downloads: over loopback with interruptions, and against the spool alone with hostile requests. */
#include "tests/transport/fixture.h"

#include <setjmp.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/file.h"
#include "crypto/hash.h"
#include "crypto/random.h"
#include "protocol/transport/spool.h"

#define CHUNK (64u << 10)
#define BYTES (10 * CHUNK + 777)

static struct federation federation;
static uint8_t data[BYTES];
static const struct transfer_id id = {.job = "icd", .round = 7, .attempt = 1, .name = "masked.vector"};

struct site {
    struct spool *spool;
    const char *name;
    unsigned puts, puts_max; /* after so many, the line is dead */
    unsigned committed;
    bool closed; /* the daemon no longer admits uploads */
    bool flip;   /* the line changes a byte of each chunk */
};

static int allow(void *ctx, const char *site, const struct transfer_begin *begin, struct error *err)
{
    struct site *s = ctx;
    (void)begin;
    return s->closed ? error_set(err, ERR_POLICY, "%s: the round is closed", site) : 0;
}

static int committed(void *ctx, const char *site, const struct transfer_id *which, uint64_t size, struct error *err)
{
    struct site *s = ctx;
    (void)site, (void)err;
    assert_int_equal(which->round, 7);
    assert_true(size > 0);
    s->committed++;
    return 0;
}

static void open_spool(struct site *s, uint64_t quota)
{
    char folder[300];
    struct error err = {0};
    snprintf(folder, sizeof folder, "%s/spool", federation.folder);
    struct spool_config config = {.folder = folder,
                                  .quota_bytes = quota,
                                  .chunk_bytes_max = CHUNK,
                                  .allow = allow,
                                  .committed = committed,
                                  .ctx = s};
    spool_close(s->spool);
    s->spool = NULL;
    if (spool_open(&s->spool, &config, &err) < 0)
        fail_msg("%s", err.message);
}

static void fresh(struct site *s, uint64_t quota)
{
    char command[400];
    snprintf(command, sizeof command, "rm -rf '%s/spool'", federation.folder);
    assert_int_equal(system(command), 0);
    *s = (struct site){.name = "site-0", .puts_max = 1000};
    open_spool(s, quota);
}

/* A channel straight into the spool. */
static int direct(void *ctx, uint16_t method, struct span request, struct buffer *reply, uint16_t *ret_status,
                  int timeout_ms, struct error *err)
{
    struct site *s = ctx;
    (void)timeout_ms;
    if (method == TRANSFER_PUT && s->puts++ >= s->puts_max)
        return error_set(err, ERR_CONNECT, "the line is dead");
    if (method == TRANSFER_PUT && s->flip)
        ((uint8_t *)(uintptr_t)request.ptr)[request.len - 1] ^= 1;
    struct rpc_reply answer = {.status = 0};
    buffer_init(&answer.body, 1 << 20);
    int rc = spool_handle(s->spool, s->name, method, request, &answer);
    buffer_clear(reply);
    if (rc < 0) {
        answer.status = RPC_STATUS_ERROR;
        buffer_u32(reply, (uint32_t)rc);
        buffer_string(reply, answer.error.message);
    } else {
        buffer_append(reply, answer.body.data, answer.body.len);
    }
    *ret_status = answer.status;
    buffer_release(&answer.body);
    return 0;
}

static const struct transfer_options options = {
    .chunk_bytes = CHUNK, .clock = &clock_system, .rng = &random_system, .call_timeout_ms = 5000};

static int upload(struct site *s, struct span bytes, struct error *err)
{
    struct rpc_channel channel = {direct, s, CHUNK + 4096};
    return transfer_upload(&channel, &id, bytes, &options, err);
}

static void check_map(struct site *s)
{
    struct error err = {0};
    struct span map;
    assert_int_equal(spool_map(s->spool, s->name, &id, &map, &err), 0);
    assert_true(span_equal(map, span_of(data, BYTES)));
    file_unmap(map);
}

static int count(void *ctx, const char *site, const struct transfer_id *which, uint64_t size)
{
    assert_string_equal(site, "site-0");
    assert_string_equal(which->name, id.name);
    assert_int_equal(size, BYTES);
    return ++*(int *)ctx, 0;
}

static void interrupted_and_resumed(void **state)
{
    (void)state;
    struct site s;
    struct error err = {0};
    struct span map;
    int seen = 0;
    fresh(&s, 1 << 20);
    s.puts_max = 4;
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), ERR_CONNECT);
    assert_false(spool_committed(s.spool, s.name, &id));
    assert_int_equal(spool_map(s.spool, s.name, &id, &map, &err), ERR_NOT_FOUND);
    open_spool(&s, 1 << 20); /* the server restarts */
    assert_int_equal(spool_bytes(s.spool), BYTES);
    s.puts = 0;
    s.puts_max = 1000;
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), 0);
    assert_int_equal(s.puts, 11 - 4);
    assert_int_equal(s.committed, 1);
    check_map(&s);
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), 0); /* the answer was lost: nothing is sent again */
    assert_int_equal(s.puts, 11 - 4);
    open_spool(&s, 1 << 20);
    assert_true(spool_committed(s.spool, s.name, &id));
    check_map(&s);
    assert_int_equal(spool_each_committed(s.spool, "icd", 7, 1, count, &seen), 0);
    assert_int_equal(seen, 1);
    assert_int_equal(spool_each_committed(s.spool, "icd", 8, 1, count, &seen), 0);
    assert_int_equal(seen, 1);
    assert_int_equal(spool_remove_round(s.spool, "icd", 7, 1, &err), 0);
    assert_int_equal(spool_bytes(s.spool), 0);
    assert_false(spool_committed(s.spool, s.name, &id));
    spool_close(s.spool);
}

static void a_server_may_start_empty(void **state)
{
    (void)state;
    struct site s;
    struct error err = {0};
    char path[400];
    fresh(&s, 1 << 20);
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), 0);
    open_spool(&s, 1 << 20); /* the server restarts */
    assert_int_equal(spool_bytes(s.spool), BYTES);
    assert_int_equal(spool_clear(s.spool, &err), 0);
    assert_int_equal(spool_bytes(s.spool), 0);
    assert_false(spool_committed(s.spool, s.name, &id));
    snprintf(path, sizeof path, "%s/spool/icd/r7.a1", federation.folder);
    assert_int_not_equal(access(path, F_OK), 0);
    assert_int_equal(spool_clear(s.spool, &err), 0);
    spool_close(s.spool);
}

static void damage_on_disk_is_noticed(void **state)
{
    (void)state;
    struct site s;
    struct error err = {0};
    struct span map;
    char path[400];
    fresh(&s, 1 << 20);
    s.puts_max = 5;
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), ERR_CONNECT);
    snprintf(path, sizeof path, "%s/spool/icd/r7.a1/site-0/masked.vector.part", federation.folder);
    FILE *f = fopen(path, "r+");
    assert_non_null(f);
    fseek(f, 2 * CHUNK + 5, SEEK_SET);
    fputc(data[2 * CHUNK + 5] ^ 1, f); /* a chunk that never reached the disk */
    fclose(f);
    open_spool(&s, 1 << 20);
    s.puts = 0;
    s.puts_max = 1000;
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), 0);
    assert_int_equal(s.puts, 11 - 4);
    check_map(&s);
    open_spool(&s, 1 << 20);
    snprintf(path, sizeof path, "%s/spool/icd/r7.a1/site-0/masked.vector.done", federation.folder);
    f = fopen(path, "r+");
    assert_non_null(f);
    fputc(data[0] ^ 1, f);
    fclose(f);
    assert_int_equal(spool_map(s.spool, s.name, &id, &map, &err), ERR_INTEGRITY);
    spool_close(s.spool);
}

static void refusals(void **state)
{
    (void)state;
    struct site s;
    struct error err = {0};
    fresh(&s, BYTES - 1);
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), ERR_RESOURCES); /* quota */
    assert_int_equal(spool_bytes(s.spool), 0);
    open_spool(&s, 1 << 20);
    s.closed = true;
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), ERR_POLICY);
    s.closed = false;
    s.flip = true;
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), ERR_INTEGRITY); /* wrong root */
    assert_non_null(strstr(err.message, "Merkle root"));
    assert_int_equal(s.committed, 0);
    assert_int_equal(spool_bytes(s.spool), 0); /* nothing of it stays */
    s.flip = false;
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), 0);
    assert_int_equal(upload(&s, span_of(data, BYTES - 1), &err), ERR_INTEGRITY); /* same id, other contents */
    assert_non_null(strstr(err.message, "other contents"));
    s.name = "site-1"; /* another site's upload of the same name is another file */
    assert_int_equal(upload(&s, span_of(data, CHUNK), &err), 0);
    spool_close(s.spool);
}

static int raw(struct site *s, uint16_t method, const struct transfer_id *which, uint32_t index, size_t len,
               const uint8_t *bytes, size_t cut)
{
    struct rpc_reply reply = {0};
    struct buffer b;
    buffer_init(&b, 1 << 20);
    buffer_init(&reply.body, 1 << 20);
    transfer_id_encode(&b, which);
    if (method == TRANSFER_PUT) {
        buffer_u32(&b, index);
        buffer_bytes(&b, span_of(bytes, len));
    }
    int rc = spool_handle(s->spool, s->name, method, span_of(b.data, b.len - cut), &reply);
    buffer_release(&b);
    buffer_release(&reply.body);
    return rc;
}

static void hostile_requests(void **state)
{
    (void)state;
    struct site s;
    struct error err = {0};
    struct transfer_id bad = id;
    fresh(&s, 1 << 20);
    s.puts_max = 0;
    assert_int_equal(upload(&s, span_of(data, BYTES), &err), ERR_CONNECT);              /* BEGIN only */
    assert_int_equal(raw(&s, TRANSFER_COMMIT, &id, 0, 0, NULL, 0), ERR_AGAIN);          /* too early */
    assert_int_equal(raw(&s, TRANSFER_PUT, &id, 10, 777, data + 10 * CHUNK, 0), 0);     /* any order */
    assert_int_equal(raw(&s, TRANSFER_PUT, &id, 10, 777, data + 10 * CHUNK, 0), 0);     /* twice */
    assert_int_equal(raw(&s, TRANSFER_PUT, &id, 10, 777, data, 0), ERR_INTEGRITY);      /* changed */
    assert_int_equal(raw(&s, TRANSFER_PUT, &id, 10, 778, data, 0), ERR_INTEGRITY);      /* too long */
    assert_int_equal(raw(&s, TRANSFER_PUT, &id, 0, CHUNK - 1, data, 0), ERR_INTEGRITY); /* too short */
    assert_int_equal(raw(&s, TRANSFER_PUT, &id, 0, CHUNK + 1, data, 0), ERR_INTEGRITY); /* oversize */
    assert_int_equal(raw(&s, TRANSFER_PUT, &id, 11, 1, data, 0), ERR_INTEGRITY);        /* no such chunk */
    assert_int_equal(raw(&s, TRANSFER_PUT, &id, UINT32_MAX, CHUNK, data, 0), ERR_INTEGRITY);
    for (size_t cut = 1; cut < 40; cut++)
        assert_int_equal(raw(&s, TRANSFER_COMMIT, &id, 0, 0, NULL, cut < 30 ? cut : 30), ERR_INTEGRITY); /* truncated */
    bad.round = 8;
    assert_int_equal(raw(&s, TRANSFER_PUT, &bad, 0, CHUNK, data, 0), ERR_NOT_FOUND);
    static const char *const names[] = {"..", "../x", "a/b", ".hidden", "A", "", "x\ny"};
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        bad = id;
        snprintf(bad.name, sizeof bad.name, "%s", names[i]);
        assert_int_equal(raw(&s, TRANSFER_PUT, &bad, 0, CHUNK, data, 0), ERR_INTEGRITY);
        bad = id;
        snprintf(bad.job, sizeof bad.job, "%s", names[i]);
        assert_int_equal(raw(&s, TRANSFER_COMMIT, &bad, 0, 0, NULL, 0), ERR_INTEGRITY);
        assert_false(tls_id_valid(names[i]));
    }
    spool_close(s.spool);
}

struct network {
    struct site site;
    char object[400];
    uint8_t sha256[TLS_HASH_BYTES];
};

static int serve(void *ctx, const struct rpc_peer *peer, uint16_t method, struct span body, struct rpc_reply *reply)
{
    struct network *n = ctx;
    struct transfer_get get;
    if (method != TRANSFER_GET)
        return spool_handle(n->site.spool, peer->site, method, body, reply);
    int rc = transfer_get_decode(body, &get, &reply->error);
    if (rc < 0)
        return rc;
    return strcmp(get.name, "memory") == 0 ? transfer_get_reply(&get, span_of(data, BYTES), reply)
                                           : transfer_get_reply_file(&get, n->object, reply);
}

struct restart {
    struct server_thread *server;
    struct network *network;
    bool done;
};

/* In the middle of the upload the aggregator goes away and comes back, with a spool that knows only its files. */
static void on_progress(void *ctx, uint64_t done, uint64_t total)
{
    struct restart *r = ctx;
    if (r->done || done < total / 2)
        return;
    r->done = true;
    server_stop(r->server);
    open_spool(&r->network->site, 1 << 20);
    server_start(r->server, &federation, serve, r->network, CHUNK, true);
}

static void over_the_network(void **state)
{
    (void)state;
    struct network n = {0};
    struct server_thread server = {0};
    struct error err = {0};
    struct buffer out;
    char path[400], part[420];
    fresh(&n.site, 1 << 20);
    hash_bytes(span_of(data, BYTES), n.sha256);
    snprintf(n.object, sizeof n.object, "%s/object", federation.folder);
    assert_int_equal(file_write_atomic(n.object, span_of(data, BYTES), 0600, &err), 0);
    server_start(&server, &federation, serve, &n, CHUNK, true);
    struct rpc_client *client = federation_client(&federation, "site-0", CHUNK);
    struct rpc_channel channel = rpc_client_channel(client);
    struct restart restart = {.server = &server, .network = &n};
    struct transfer_options o = options;
    o.deadline_ms = 20000;
    o.progress = on_progress;
    o.progress_ctx = &restart;
    if (transfer_upload(&channel, &id, span_of(data, BYTES), &o, &err) < 0)
        fail_msg("%s", err.message);
    assert_true(restart.done);
    o.progress = NULL;

    buffer_init(&out, BYTES);
    assert_int_equal(transfer_download(&channel, "memory", n.sha256, &out, &o, &err), 0);
    assert_true(span_equal(buffer_span(&out), span_of(data, BYTES)));
    snprintf(path, sizeof path, "%s/fetched", federation.folder);
    snprintf(part, sizeof part, "%s.part", path);
    assert_int_equal(file_write_atomic(part, span_of(data, 3 * CHUNK + 1), 0600, &err), 0); /* of an earlier try */
    assert_int_equal(transfer_download_file(&channel, "file", n.sha256, path, BYTES, &o, &err), 0);
    buffer_clear(&out);
    assert_int_equal(file_read(path, &out, &err), 0);
    assert_true(span_equal(buffer_span(&out), span_of(data, BYTES)));
    assert_int_equal(transfer_download_file(&channel, "file", n.sha256, path, BYTES - 1, &o, &err), ERR_RESOURCES);
    n.sha256[0] ^= 1;
    buffer_clear(&out);
    assert_int_equal(transfer_download(&channel, "memory", n.sha256, &out, &o, &err), ERR_INTEGRITY);
    assert_int_equal(out.len, 0);
    server_pause(&server);
    assert_true(rpc_server_site_counters(server.server, "site-0").bytes_sent > 2 * BYTES);
    assert_int_equal(rpc_server_site_counters(server.server, "site-1").bytes_sent, 0);
    check_map(&n.site);
    server_resume(&server);
    server_stop(&server);
    spool_close(n.site.spool);
    buffer_release(&out);
    rpc_client_free(client);
}

static int setup(void **state)
{
    (void)state;
    rng_fill(&random_system, data, sizeof data);
    federation_make(&federation, 2);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    federation_remove(&federation);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(interrupted_and_resumed),  cmocka_unit_test(damage_on_disk_is_noticed),
        cmocka_unit_test(a_server_may_start_empty), cmocka_unit_test(refusals),
        cmocka_unit_test(hostile_requests),         cmocka_unit_test(over_the_network),
    };
    return cmocka_run_group_tests_name("transfer", tests, setup, teardown);
}
