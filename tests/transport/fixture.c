#include "tests/transport/fixture.h"

#include <setjmp.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/file.h"
#include "crypto/authority.h"
#include "crypto/random.h"

#define NOW_S (clock_wall_ms(&clock_system) / 1000)

static const char *path_of(const struct federation *f, const char *name, const char *suffix)
{
    static _Thread_local char paths[8][400];
    static _Thread_local unsigned next;
    char *out = paths[next++ % 8];
    snprintf(out, 400, "%s/%s%s", f->folder, name, suffix);
    return out;
}

static struct certificate *make_site(const struct federation *f, const char *file, const char *id,
                                     const struct identity_key *ca_key, const struct certificate *ca, int64_t now_s)
{
    struct error err = {0};
    struct identity_key *key = NULL;
    struct certificate *certificate = NULL;
    struct buffer request;
    buffer_init(&request, IDENTITY_PEM_MAX);
    assert_int_equal(identity_key_create(&random_system, &key, &err), 0);
    assert_int_equal(identity_key_store(key, path_of(f, file, ".key"), &err), 0);
    assert_int_equal(identity_request(key, IDENTITY_SITE, id, &request, &err), 0);
    assert_int_equal(
        authority_approve(ca_key, ca, buffer_span(&request), now_s, 30, &random_system, &certificate, &err), 0);
    assert_int_equal(certificate_store(certificate, path_of(f, file, ".crt"), &err), 0);
    buffer_release(&request);
    identity_key_free(key);
    return certificate;
}

static void make_crl(const struct federation *f, const char *file, const struct identity_key *ca_key,
                     const struct certificate *ca, const struct certificate *revoked)
{
    struct error err = {0};
    struct buffer pem;
    struct span serial = revoked != NULL ? certificate_serial(revoked) : span_of(NULL, 0);
    buffer_init(&pem, IDENTITY_PEM_MAX);
    assert_int_equal(authority_crl(ca_key, ca, &serial, revoked != NULL, 1, NOW_S, 30, &pem, &err), 0);
    assert_int_equal(file_write_atomic(path_of(f, file, ""), buffer_span(&pem), 0644, &err), 0);
    buffer_release(&pem);
}

void federation_make(struct federation *f, unsigned sites)
{
    struct error err = {0};
    struct identity_key *ca_key = NULL, *other_key = NULL, *key = NULL;
    struct certificate *ca = NULL, *other_ca = NULL, *server = NULL;
    static atomic_uint ports;
    const char *names[] = {"localhost"};
    snprintf(f->folder, sizeof f->folder, "/tmp/consilium-transport-XXXXXX");
    assert_non_null(mkdtemp(f->folder));
    snprintf(f->url, sizeof f->url, "tcp://127.0.0.1:%u", 20000 + (unsigned)getpid() % 4000 * 10 + ports++ % 10);
    assert_int_equal(identity_key_create(&random_system, &ca_key, &err), 0);
    assert_int_equal(identity_key_create(&random_system, &other_key, &err), 0);
    assert_int_equal(authority_create(ca_key, "demo", NOW_S - 90 * 86400, 3650, &random_system, &ca, &err), 0);
    assert_int_equal(authority_create(other_key, "demo", NOW_S, 3650, &random_system, &other_ca, &err), 0);
    assert_int_equal(certificate_store(ca, path_of(f, "ca", ".crt"), &err), 0);
    assert_int_equal(identity_key_create(&random_system, &key, &err), 0);
    assert_int_equal(identity_key_store(key, path_of(f, "aggregator", ".key"), &err), 0);
    assert_int_equal(
        authority_server(ca_key, ca, identity_public(key), names, 1, NOW_S, 30, &random_system, &server, &err), 0);
    assert_int_equal(certificate_store(server, path_of(f, "aggregator", ".crt"), &err), 0);
    for (unsigned i = 0; i < sites; i++) {
        char id[32];
        snprintf(id, sizeof id, "site-%u", i);
        certificate_free(make_site(f, id, id, ca_key, ca, NOW_S));
    }
    certificate_free(make_site(f, "expired", "expired", ca_key, ca, NOW_S - 60 * 86400));
    certificate_free(make_site(f, "stranger", "site-0", other_key, other_ca, NOW_S));
    struct certificate *revoked = make_site(f, "revoked", "revoked", ca_key, ca, NOW_S);
    make_crl(f, "empty.crl", ca_key, ca, NULL);
    make_crl(f, "revoked.crl", ca_key, ca, revoked);
    certificate_free(revoked);
    certificate_free(server);
    certificate_free(ca);
    certificate_free(other_ca);
    identity_key_free(key);
    identity_key_free(ca_key);
    identity_key_free(other_key);
}

void federation_remove(struct federation *f)
{
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", f->folder);
    assert_int_equal(system(command), 0);
}

struct tls_config federation_tls(const struct federation *f, const char *name, bool crl)
{
    return (struct tls_config){.certificate_file = path_of(f, name, ".crt"),
                               .key_file = path_of(f, name, ".key"),
                               .ca_file = path_of(f, "ca", ".crt"),
                               .crl_file = crl ? path_of(f, "revoked.crl", "") : NULL,
                               .federation = "demo",
                               .clock = &clock_system};
}

struct rpc_client *federation_client(const struct federation *f, const char *name, uint32_t chunk_bytes)
{
    struct error err = {0};
    struct rpc_client *client = NULL;
    struct rpc_client_config config = {.url = f->url,
                                       .tls = federation_tls(f, name, false),
                                       .chunk_bytes = chunk_bytes,
                                       .clock = &clock_system,
                                       .rng = &random_system};
    if (rpc_client_new(&client, &config, &err) < 0)
        fail_msg("%s", err.message);
    return client;
}

static void *server_main(void *arg)
{
    struct server_thread *t = arg;
    struct error err = {0};
    while (!t->stop) {
        if (rpc_server_poll(t->server, 20, &err) < 0)
            abort();
        if (t->tick != NULL)
            t->tick(t->tick_ctx, t->server);
    }
    return NULL;
}

void server_start(struct server_thread *t, const struct federation *f, rpc_handler *handle, void *ctx,
                  uint32_t chunk_bytes, bool crl)
{
    struct error err = {0};
    struct rpc_server_config config = {.url = f->url,
                                       .tls = federation_tls(f, "aggregator", crl),
                                       .chunk_bytes = chunk_bytes,
                                       .clock = &clock_system,
                                       .handle = handle,
                                       .handle_ctx = ctx};
    int rc = ERR_CONNECT;
    for (int i = 0; i < 50 && rc == ERR_CONNECT; i++) {
        rc = rpc_server_new(&t->server, &config, &err);
        if (rc == ERR_CONNECT)
            usleep(100000); /* a port of a server that has just closed */
    }
    if (rc < 0)
        fail_msg("%s", err.message);
    server_resume(t);
}

void server_resume(struct server_thread *t)
{
    t->stop = false;
    assert_int_equal(pthread_create(&t->thread, NULL, server_main, t), 0);
}

void server_pause(struct server_thread *t)
{
    t->stop = true;
    pthread_join(t->thread, NULL);
}

void server_stop(struct server_thread *t)
{
    server_pause(t);
    rpc_server_free(t->server);
    t->server = NULL;
}
