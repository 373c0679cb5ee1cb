/* A federation in a temporary folder (CA, aggregator, sites, strangers) and a server in its own thread. */
#ifndef TESTS_TRANSPORT_FIXTURE_H
#define TESTS_TRANSPORT_FIXTURE_H

#include <pthread.h>
#include <stdatomic.h>

#include "protocol/transport/rpc.h"

struct federation {
    char folder[256];
    char url[64];
};

/* Makes the folder with: ca.crt, empty.crl, revoked.crl (revokes "revoked"), aggregator.crt/.key and site files
 * NAME.crt/.key for site-0 .. site-<sites-1>, revoked, expired, and stranger (another CA, same id as site-0). */
void federation_make(struct federation *f, unsigned sites);
void federation_remove(struct federation *f);

struct tls_config federation_tls(const struct federation *f, const char *name, bool crl);
struct rpc_client *federation_client(const struct federation *f, const char *name, uint32_t chunk_bytes);

struct server_thread {
    struct rpc_server *server;
    pthread_t thread;
    atomic_bool stop;
    void (*tick)(void *ctx, struct rpc_server *server); /* called after each poll; NULL: none */
    void *tick_ctx;
};
void server_start(struct server_thread *t, const struct federation *f, rpc_handler *handle, void *ctx,
                  uint32_t chunk_bytes, bool crl);
/* The thread alone, so that the test may touch the server. */
void server_pause(struct server_thread *t);
void server_resume(struct server_thread *t);
void server_stop(struct server_thread *t);

#endif
