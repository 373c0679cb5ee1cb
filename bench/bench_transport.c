/*
 * Requests a second and MiB/s of the rpc layer over loopback: TLS 1.3 with real certificates, one client, one server.
 *
 *     bench_transport [--json] [SECONDS]
 */
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "base/file.h"
#include "crypto/authority.h"
#include "crypto/random.h"
#include "protocol/transport/rpc.h"

#define CHUNK RPC_CHUNK_BYTES_DEFAULT

static int handle(void *ctx, const struct rpc_peer *peer, uint16_t method, struct span body, struct rpc_reply *reply)
{
    (void)ctx, (void)peer;
    if (method == 2)
        return buffer_extend(&reply->body, CHUNK) != NULL ? 0 : ERR_RESOURCES;
    buffer_u32(&reply->body, (uint32_t)body.len);
    return 0;
}

struct server {
    struct rpc_server *rpc;
    atomic_bool stop;
};

static void *server_main(void *arg)
{
    struct server *s = arg;
    struct error err;
    while (!s->stop && rpc_server_poll(s->rpc, 50, &err) == 0)
        ;
    return NULL;
}

static void join(char out[400], const char *folder, const char *name)
{
    file_join(out, 400, folder, name);
}

static int make_party(const char *folder, const char *name, bool server, const struct identity_key *ca_key,
                      const struct certificate *ca, struct error *err)
{
    char key_file[400], file[400], certificate_file[400];
    struct identity_key *key = NULL;
    struct certificate *certificate = NULL;
    struct buffer request;
    int64_t now = clock_wall_ms(&clock_system) / 1000;
    buffer_init(&request, IDENTITY_PEM_MAX);
    snprintf(file, sizeof file, "%s.key", name);
    join(key_file, folder, file);
    snprintf(file, sizeof file, "%s.crt", name);
    join(certificate_file, folder, file);
    int rc = identity_key_create(&random_system, &key, err);
    if (rc == 0)
        rc = identity_key_store(key, key_file, err);
    if (rc == 0 && server)
        rc = authority_server(ca_key, ca, identity_public(key), (const char *[]){"localhost"}, 1, now, 2,
                              &random_system, &certificate, err);
    if (rc == 0 && !server)
        rc = identity_request(key, IDENTITY_SITE, name, &request, err);
    if (rc == 0 && !server)
        rc = authority_approve(ca_key, ca, buffer_span(&request), now, 2, &random_system, &certificate, err);
    if (rc == 0)
        rc = certificate_store(certificate, certificate_file, err);
    buffer_release(&request);
    certificate_free(certificate);
    identity_key_free(key);
    return rc;
}

static int make_federation(const char *folder, struct error *err)
{
    char file[400];
    struct identity_key *ca_key = NULL;
    struct certificate *ca = NULL;
    join(file, folder, "ca.crt");
    int rc = identity_key_create(&random_system, &ca_key, err);
    if (rc == 0)
        rc = authority_create(ca_key, "bench", clock_wall_ms(&clock_system) / 1000, 2, &random_system, &ca, err);
    if (rc == 0)
        rc = certificate_store(ca, file, err);
    if (rc == 0)
        rc = make_party(folder, "aggregator", true, ca_key, ca, err);
    if (rc == 0)
        rc = make_party(folder, "site", false, ca_key, ca, err);
    certificate_free(ca);
    identity_key_free(ca_key);
    return rc;
}

/* Calls a second, for `seconds`. */
static int measure(struct rpc_client *client, uint16_t method, struct span body, bool fresh, double seconds,
                   double *ret_rate, struct error *err)
{
    struct buffer reply;
    int rc = 0;
    uint64_t calls = 0;
    buffer_init(&reply, rpc_client_body_bytes_max(client));
    int64_t start = clock_monotonic_ms(&clock_system), now = start;
    while (rc == 0 && (double)(now - start) < seconds * 1000) {
        if (fresh)
            rpc_client_reset(client);
        rc = rpc_call_ok(client, method, body, &reply, 10000, err);
        calls++;
        now = clock_monotonic_ms(&clock_system);
    }
    buffer_release(&reply);
    *ret_rate = (double)calls * 1000 / (double)(now - start);
    return rc;
}

int main(int argc, char **argv)
{
    bool json = argc > 1 && strcmp(argv[1], "--json") == 0;
    double seconds = argc > 1 + json ? strtod(argv[1 + json], NULL) : 2;
    if (!(seconds > 0)) {
        fprintf(stderr, "usage: bench_transport [--json] [SECONDS]\n");
        return 2;
    }
    char folder[] = "/tmp/consilium-bench-XXXXXX", url[64], files[5][400];
    static const char *const names[5] = {"ca.crt", "aggregator.crt", "aggregator.key", "site.crt", "site.key"};
    struct error err = {0};
    struct server server = {0};
    struct rpc_client *client = NULL;
    pthread_t thread;
    bool running = false;
    double small = 0, up = 0, down = 0, handshakes = 0;
    if (mkdtemp(folder) == NULL)
        return 7;
    for (int i = 0; i < 5; i++)
        join(files[i], folder, names[i]);
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", 20000 + (int)getpid() % 40000);
    struct tls_config tls = {
        .certificate_file = files[1], .key_file = files[2], .ca_file = files[0], .federation = "bench"};
    struct rpc_server_config server_config = {.url = url, .tls = tls, .clock = &clock_system, .handle = handle};
    struct rpc_client_config client_config = {.url = url, .tls = tls, .clock = &clock_system, .rng = &random_system};
    client_config.tls.certificate_file = files[3];
    client_config.tls.key_file = files[4];
    uint8_t *chunk = calloc(1, CHUNK);
    int rc = chunk == NULL ? error_set(&err, ERR_RESOURCES, "no memory") : make_federation(folder, &err);
    if (rc == 0)
        rc = rpc_server_new(&server.rpc, &server_config, &err);
    if (rc == 0)
        running = pthread_create(&thread, NULL, server_main, &server) == 0;
    if (rc == 0)
        rc = rpc_client_new(&client, &client_config, &err);
    if (rc == 0)
        rc = measure(client, 1, span_of(chunk, 64), true, seconds, &handshakes, &err);
    if (rc == 0)
        rc = measure(client, 1, span_of(chunk, 64), false, seconds, &small, &err);
    if (rc == 0)
        rc = measure(client, 1, span_of(chunk, CHUNK), false, seconds, &up, &err);
    if (rc == 0)
        rc = measure(client, 2, span_of(chunk, 0), false, seconds, &down, &err);
    double mib = CHUNK / 1048576.0;
    if (rc < 0)
        fprintf(stderr, "bench_transport: %s\n", err.message);
    else if (json)
        printf("{\"handshakes_per_s\": %.0f, \"calls_per_s\": %.0f, \"upload_mib_per_s\": %.1f, "
               "\"download_mib_per_s\": %.1f}\n",
               handshakes, small, up * mib, down * mib);
    else
        printf("handshake and 64-byte call   %8.0f /s\n64-byte call                 %8.0f /s\n"
               "4 MiB chunk up               %8.1f MiB/s\n4 MiB chunk down             %8.1f MiB/s\n",
               handshakes, small, up * mib, down * mib);
    server.stop = true;
    if (running)
        pthread_join(thread, NULL);
    rpc_client_free(client);
    rpc_server_free(server.rpc);
    free(chunk);
    for (int i = 0; i < 5; i++)
        unlink(files[i]);
    rmdir(folder);
    return error_exit_code(rc);
}
