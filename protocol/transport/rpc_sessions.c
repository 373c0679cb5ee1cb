#include "protocol/transport/rpc_sessions.h"

static struct session **bucket_of(struct sessions *t, const uint8_t id[WIRE_ID_BYTES])
{
    uint32_t h;
    memcpy(&h, id, sizeof h);
    return &t->buckets[h % SESSION_BUCKETS];
}

struct session *sessions_find(struct sessions *t, const uint8_t id[WIRE_ID_BYTES])
{
    struct session *session = *bucket_of(t, id);
    while (session != NULL && memcmp(session->id, id, WIRE_ID_BYTES) != 0)
        session = session->bucket_next;
    return session;
}

void sessions_remove(struct sessions *t, struct session *session)
{
    struct session **link = bucket_of(t, session->id);
    while (*link != session)
        link = &(*link)->bucket_next;
    *link = session->bucket_next;
    *(session->newer != NULL ? &session->newer->older : &t->newest) = session->older;
    *(session->older != NULL ? &session->older->newer : &t->oldest) = session->newer;
    if (session->site[0] != '\0')
        t->authenticated--;
    else
        t->unauthenticated--;
    tls_session_free(session->tls);
    free(session);
}

void sessions_release(struct sessions *t)
{
    while (t->newest != NULL)
        sessions_remove(t, t->newest);
    while (t->sites != NULL) {
        struct site_counters *next = t->sites->next;
        free(t->sites);
        t->sites = next;
    }
}

/* The oldest session of a site, or the oldest unauthenticated one for "". */
static struct session *oldest_of(struct sessions *t, const char *site)
{
    struct session *session = t->oldest;
    while (session != NULL && strcmp(session->site, site) != 0)
        session = session->newer;
    return session;
}

struct session *sessions_add(struct sessions *t, const uint8_t id[WIRE_ID_BYTES], const struct route *route,
                             int64_t now)
{
    if (t->unauthenticated >= t->unauthenticated_max)
        sessions_remove(t, oldest_of(t, ""));
    struct session *session = calloc(1, sizeof *session);
    if (session == NULL)
        return NULL;
    memcpy(session->id, id, WIRE_ID_BYTES);
    session->route = *route;
    session->last_ms = now;
    session->connection = ++t->next_connection;
    struct session **bucket = bucket_of(t, id);
    session->bucket_next = *bucket;
    *bucket = session;
    session->older = t->newest;
    *(t->newest != NULL ? &t->newest->newer : &t->oldest) = session;
    t->newest = session;
    t->unauthenticated++;
    return session;
}

static struct rpc_counters *counters_of(struct sessions *t, const char *site)
{
    struct site_counters *entry = t->sites;
    while (entry != NULL && strcmp(entry->site, site) != 0)
        entry = entry->next;
    if (entry == NULL) {
        entry = calloc(1, sizeof *entry);
        if (entry == NULL)
            return NULL;
        snprintf(entry->site, sizeof entry->site, "%s", site);
        entry->next = t->sites;
        t->sites = entry;
    }
    return &entry->counters;
}

bool sessions_authenticate(struct sessions *t, struct session *session, const struct tls_peer *peer)
{
    uint32_t same = 0;

    assert(t->per_site_max > 0);
    for (const struct session *other = t->newest; other != NULL; other = other->older)
        same += strcmp(other->site, peer->id) == 0;
    if (same >= t->per_site_max)
        sessions_remove(t, oldest_of(t, peer->id));
    struct rpc_counters *counters = t->authenticated < t->authenticated_max ? counters_of(t, peer->id) : NULL;
    if (counters == NULL)
        return false;
    session->counters = counters;
    snprintf(session->site, sizeof session->site, "%s", peer->id);
    t->unauthenticated--;
    t->authenticated++;
    return true;
}

struct rpc_counters sessions_site_counters(const struct sessions *t, const char *site)
{
    for (const struct site_counters *entry = t->sites; entry != NULL; entry = entry->next)
        if (strcmp(entry->site, site) == 0)
            return entry->counters;
    return (struct rpc_counters){0};
}
