#include "protocol/transport/spool.h"

#include <dirent.h>
#include <errno.h>
#include <unistd.h>

#include "protocol/transport/spool_upload.h"
#include "base/file.h"

struct spool {
    struct spool_config config;
    char *folder;
    uint64_t bytes; /* announced sizes of all uploads on the disk */
    uint32_t count;
    struct upload *uploads; /* those looked at since the start */
};

typedef int each_map(void *ctx, const char *site, const struct transfer_id *id, const char *map_path,
                     struct error *err);

static int not_hidden(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

/* Calls back for each NAME.map below FOLDER/job/round, in the order of site, then name. Foreign names are skipped. */
static int each_in_round(const char *folder, const char *job, uint32_t round, uint32_t attempt, each_map *visit,
                         void *ctx, struct error *err)
{
    char path[SPOOL_PATH_SIZE], inner[SPOOL_PATH_SIZE + 300], file[SPOOL_PATH_SIZE + 600];
    struct dirent **sites = NULL;
    int rc = 0;
    snprintf(path, sizeof path, "%s/%s/r%u.a%u", folder, job, round, attempt);
    int n = scandir(path, &sites, not_hidden, alphasort);
    for (int i = 0; i < n; i++) {
        struct dirent **names = NULL;
        const char *site = sites[i]->d_name;
        snprintf(inner, sizeof inner, "%s/%s", path, site);
        int m = rc == 0 && tls_id_valid(site) ? scandir(inner, &names, not_hidden, alphasort) : 0;
        for (int k = 0; k < m; k++) {
            const char *name = names[k]->d_name;
            size_t len = strlen(name);
            struct transfer_id id = {.round = round, .attempt = attempt};
            if (rc == 0 && len > 4 && len - 4 < sizeof id.name && strcmp(name + len - 4, ".map") == 0) {
                snprintf(id.job, sizeof id.job, "%s", job);
                memcpy(id.name, name, len - 4);
                snprintf(file, sizeof file, "%s/%s", inner, name);
                if (tls_id_valid(id.name))
                    rc = visit(ctx, site, &id, file, err);
            }
            free(names[k]);
        }
        free(names);
        free(sites[i]);
    }
    free(sites);
    return rc;
}

static int count_upload(void *ctx, const char *site, const struct transfer_id *id, const char *map_path,
                        struct error *err)
{
    struct spool *spool = ctx;
    struct transfer_begin begin = {.id = *id};
    int rc = upload_read_map(map_path, &begin, NULL, err);
    if (rc == ERR_INTEGRITY)
        return upload_unlink(spool->folder, site, id, err); /* cut off while it was made: nothing was acknowledged */
    if (rc < 0)
        return rc;
    spool->bytes += begin.size_bytes;
    spool->count++;
    return 0;
}

/* Calls back for each FOLDER/job/rROUND.aATTEMPT. */
static int each_round(struct spool *spool,
                      int (*visit)(struct spool *spool, const char *job, uint32_t round, uint32_t attempt,
                                   struct error *err),
                      struct error *err)
{
    char path[SPOOL_PATH_SIZE];
    struct dirent **jobs = NULL;
    int rc = 0;
    int n = scandir(spool->folder, &jobs, not_hidden, alphasort);
    if (n < 0)
        return error_set(err, ERR_RESOURCES, "%s: %s", spool->folder, strerror(errno));
    for (int i = 0; i < n; i++) {
        struct dirent **rounds = NULL;
        snprintf(path, sizeof path, "%s/%s", spool->folder, jobs[i]->d_name);
        int m = rc == 0 && tls_id_valid(jobs[i]->d_name) ? scandir(path, &rounds, not_hidden, alphasort) : 0;
        for (int k = 0; k < m; k++) {
            unsigned round = 0, attempt = 0;
            char again[64];
            bool read = sscanf(rounds[k]->d_name, "r%u.a%u", &round, &attempt) == 2;
            snprintf(again, sizeof again, "r%u.a%u", round, attempt);
            if (rc == 0 && read && strcmp(again, rounds[k]->d_name) == 0)
                rc = visit(spool, jobs[i]->d_name, round, attempt, err);
            free(rounds[k]);
        }
        free(rounds);
        free(jobs[i]);
    }
    free(jobs);
    return rc;
}

static int count_round(struct spool *spool, const char *job, uint32_t round, uint32_t attempt, struct error *err)
{
    return each_in_round(spool->folder, job, round, attempt, count_upload, spool, err);
}

int spool_open(struct spool **ret, const struct spool_config *config, struct error *err)
{
    struct spool *spool = calloc(1, sizeof *spool);
    if (spool == NULL || (spool->folder = strdup(config->folder)) == NULL) {
        free(spool);
        return error_set(err, ERR_RESOURCES, "no memory for a spool");
    }
    spool->config = *config;
    spool->config.folder = spool->folder;
    if (spool->config.upload_bytes_max == 0)
        spool->config.upload_bytes_max = config->quota_bytes;
    if (spool->config.uploads_max == 0)
        spool->config.uploads_max = 4096;
    if (spool->config.chunk_bytes_max == 0)
        spool->config.chunk_bytes_max = RPC_CHUNK_BYTES_DEFAULT;
    int rc = strlen(spool->folder) > SPOOL_PATH_SIZE / 2
                 ? error_set(err, ERR_CONFIG, "the spool folder's path is too long")
                 : file_make_folder(spool->folder, 0700, err);
    if (rc == 0)
        rc = each_round(spool, count_round, err);
    if (rc < 0) {
        spool_close(spool);
        return rc;
    }
    *ret = spool;
    return 0;
}

void spool_close(struct spool *spool)
{
    if (spool == NULL)
        return;
    while (spool->uploads != NULL) {
        struct upload *next = spool->uploads->next;
        upload_free(spool->uploads);
        spool->uploads = next;
    }
    free(spool->folder);
    free(spool);
}

static bool same_id(const struct transfer_id *a, const struct transfer_id *b)
{
    return a->round == b->round && a->attempt == b->attempt && strcmp(a->job, b->job) == 0 &&
           strcmp(a->name, b->name) == 0;
}

static int find(struct spool *spool, const char *site, const struct transfer_id *id, struct upload **ret,
                struct error *err)
{
    struct upload *u = spool->uploads;
    while (u != NULL && (strcmp(u->site, site) != 0 || !same_id(&u->begin.id, id)))
        u = u->next;
    if (u == NULL) {
        int rc = upload_load(spool->folder, site, id, &u, err);
        if (rc == ERR_NOT_FOUND)
            return error_set(err, rc, "no such upload: '%s' of round %u", id->name, id->round);
        if (rc < 0)
            return rc;
        u->next = spool->uploads;
        spool->uploads = u;
    }
    *ret = u;
    return 0;
}

static void forget(struct spool *spool, struct upload *u)
{
    struct upload **link = &spool->uploads;
    while (*link != u)
        link = &(*link)->next;
    *link = u->next;
    spool->bytes -= u->begin.size_bytes;
    spool->count--;
    upload_free(u);
}

static int create(struct spool *spool, const char *site, const struct transfer_begin *begin, struct upload **ret,
                  struct error *err)
{
    const struct spool_config *c = &spool->config;
    if (begin->chunk_bytes > c->chunk_bytes_max)
        return error_set(err, ERR_RESOURCES, "chunks of %u bytes, at most %u are taken", begin->chunk_bytes,
                         c->chunk_bytes_max);
    if (begin->size_bytes > c->upload_bytes_max)
        return error_set(err, ERR_RESOURCES, "an upload of %llu bytes, at most %llu are taken",
                         (unsigned long long)begin->size_bytes, (unsigned long long)c->upload_bytes_max);
    if (spool->count >= c->uploads_max || begin->size_bytes > c->quota_bytes - spool->bytes)
        return error_set(err, ERR_RESOURCES,
                         "the aggregator's spool is full: its operator has to raise the quota or "
                         "remove old rounds");
    struct upload *u = NULL;
    int rc = upload_create(spool->folder, site, begin, &u, err);
    if (rc < 0)
        return rc;
    u->next = spool->uploads;
    spool->uploads = u;
    spool->bytes += begin->size_bytes;
    spool->count++;
    *ret = u;
    return 0;
}

static int on_begin(struct spool *spool, const char *site, struct span body, struct rpc_reply *reply)
{
    struct transfer_begin begin;
    struct upload *u = NULL;
    int rc = transfer_begin_decode(body, &begin, &reply->error);
    if (rc < 0)
        return rc;
    rc = find(spool, site, &begin.id, &u, &reply->error);
    if (rc < 0 && rc != ERR_NOT_FOUND)
        return rc;
    if (u != NULL && (u->begin.size_bytes != begin.size_bytes || u->begin.chunk_bytes != begin.chunk_bytes ||
                      memcmp(u->begin.root, begin.root, sizeof begin.root) != 0))
        return error_set(&reply->error, ERR_INTEGRITY,
                         "'%s' of round %u was begun before with other contents: use a new attempt", begin.id.name,
                         begin.id.round);
    if ((u == NULL || !u->committed) && spool->config.allow != NULL &&
        (rc = spool->config.allow(spool->config.ctx, site, &begin, &reply->error)) < 0)
        return rc;
    if (u == NULL && (rc = create(spool, site, &begin, &u, &reply->error)) < 0)
        return rc;
    buffer_u8(&reply->body, u->committed);
    buffer_u32(&reply->body, u->chunks);
    buffer_u32(&reply->body, (u->chunks + 7) / 8);
    for (uint32_t at = 0; at < u->chunks; at += 8) {
        uint8_t bits = 0;
        for (uint32_t i = at; i < at + 8 && i < u->chunks; i++)
            bits |= (uint8_t)((u->committed || upload_has(u, i)) << (i - at));
        buffer_u8(&reply->body, bits);
    }
    return 0;
}

static int on_put(struct spool *spool, const char *site, struct span body, struct rpc_reply *reply)
{
    struct reader r = reader_of(body);
    struct transfer_id id = {0};
    struct upload *u = NULL;
    bool id_ok = transfer_id_read(&r, &id);
    uint32_t index = reader_u32(&r);
    struct span bytes = reader_bytes(&r, spool->config.chunk_bytes_max);
    if (!reader_done(&r) || !id_ok)
        return error_set(&reply->error, ERR_INTEGRITY, "malformed chunk");
    int rc = find(spool, site, &id, &u, &reply->error);
    return rc < 0 ? rc : upload_put(spool->folder, u, index, bytes, &reply->error);
}

static int on_commit(struct spool *spool, const char *site, struct span body, struct rpc_reply *reply)
{
    struct reader r = reader_of(body);
    struct transfer_id id = {0};
    struct upload *u = NULL;
    if (!transfer_id_read(&r, &id) || !reader_done(&r))
        return error_set(&reply->error, ERR_INTEGRITY, "malformed end of an upload");
    int rc = find(spool, site, &id, &u, &reply->error);
    if (rc == 0 && !u->committed)
        rc = upload_commit(spool->folder, u, &reply->error);
    if (rc == ERR_INTEGRITY && u != NULL) {
        /* Which chunk is wrong cannot be told from the root: all go, and the site may begin again. */
        struct error ignored;
        if (upload_unlink(spool->folder, site, &id, &ignored) == 0)
            forget(spool, u);
    }
    if (rc == 0 && spool->config.committed != NULL)
        rc = spool->config.committed(spool->config.ctx, site, &id, u->begin.size_bytes, &reply->error);
    return rc;
}

int spool_handle(struct spool *spool, const char *site, uint16_t method, struct span body, struct rpc_reply *reply)
{
    if (!tls_id_valid(site))
        return error_set(&reply->error, ERR_INTEGRITY, "not a site id");
    switch (method) {
    case TRANSFER_BEGIN:
        return on_begin(spool, site, body, reply);
    case TRANSFER_PUT:
        return on_put(spool, site, body, reply);
    case TRANSFER_COMMIT:
        return on_commit(spool, site, body, reply);
    default:
        return error_set(&reply->error, ERR_INTEGRITY, "unknown method %u", method);
    }
}

int spool_map(struct spool *spool, const char *site, const struct transfer_id *id, struct span *ret_bytes,
              struct error *err)
{
    char path[SPOOL_PATH_SIZE];
    struct upload *u = NULL;
    struct span map = {0};
    int rc = find(spool, site, id, &u, err);
    if (rc == 0 && !u->committed)
        rc = error_set(err, ERR_NOT_FOUND, "the upload '%s' of %s is not complete", id->name, site);
    if (rc == 0)
        rc = upload_path(spool->folder, site, id, ".done", path, err);
    if (rc == 0)
        rc = file_map(path, &map, err);
    if (rc < 0)
        return rc;
    rc = upload_verify(u, map, err);
    if (rc < 0)
        file_unmap(map);
    else
        *ret_bytes = map;
    return rc;
}

bool spool_committed(struct spool *spool, const char *site, const struct transfer_id *id)
{
    struct upload *u = NULL;
    struct error err;
    return find(spool, site, id, &u, &err) == 0 && u->committed;
}

int spool_remove(struct spool *spool, const char *site, const struct transfer_id *id, struct error *err)
{
    struct upload *u = NULL;
    struct error ignored;
    int found = find(spool, site, id, &u, &ignored);
    int rc = upload_unlink(spool->folder, site, id, err);
    if (rc == 0 && found == 0)
        forget(spool, u);
    return rc;
}

static int remove_visited(void *ctx, const char *site, const struct transfer_id *id, const char *map_path,
                          struct error *err)
{
    (void)map_path;
    return spool_remove(ctx, site, id, err);
}

int spool_remove_round(struct spool *spool, const char *job, uint32_t round, uint32_t attempt, struct error *err)
{
    char path[SPOOL_PATH_SIZE];
    if (!tls_id_valid(job))
        return error_set(err, ERR_CONFIG, "not a job id");
    int rc = each_in_round(spool->folder, job, round, attempt, remove_visited, spool, err);
    snprintf(path, sizeof path, "%s/%s/r%u.a%u", spool->folder, job, round, attempt);
    rmdir(path);
    return rc;
}

int spool_clear(struct spool *spool, struct error *err)
{
    return each_round(spool, spool_remove_round, err);
}

struct visit {
    struct spool *spool;
    int (*visit)(void *ctx, const char *site, const struct transfer_id *id, uint64_t size_bytes);
    void *ctx;
};

static int visit_committed(void *ctx, const char *site, const struct transfer_id *id, const char *map_path,
                           struct error *err)
{
    struct visit *v = ctx;
    struct upload *u = NULL;
    (void)map_path;
    if (find(v->spool, site, id, &u, err) < 0 || !u->committed)
        return 0;
    return v->visit(v->ctx, site, id, u->begin.size_bytes);
}

int spool_each_committed(struct spool *spool, const char *job, uint32_t round, uint32_t attempt,
                         int (*visit)(void *ctx, const char *site, const struct transfer_id *id, uint64_t size_bytes),
                         void *ctx)
{
    struct visit v = {spool, visit, ctx};
    struct error ignored;
    if (!tls_id_valid(job))
        return ERR_CONFIG;
    return each_in_round(spool->folder, job, round, attempt, visit_committed, &v, &ignored);
}

uint64_t spool_bytes(const struct spool *spool)
{
    return spool->bytes;
}
