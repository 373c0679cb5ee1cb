#include "privacy/noise_vector.h"

#include "crypto/random.h"
#include "privacy/sampler.h"

#include <pthread.h>
#include <stdatomic.h>

int noise_source_init(struct noise_source *source, uint64_t variance, const struct rng *seeds, struct error *err)
{
    uint8_t seed[RANDOM_SEED_SIZE];

    memset(source, 0, sizeof *source);
    if (!gaussian_init(&source->gaussian, variance))
        return error_set(err, ERR_CONFIG, "noise variance %llu: expected 1 to 2^52 in squared grid units",
                         (unsigned long long)variance);
    rng_fill(seeds, seed, sizeof seed);
    random_stream_key(source->key, seed, "dp-noise");
    explicit_bzero(seed, sizeof seed);
    return 0;
}

void noise_source_release(struct noise_source *source)
{
    if (source)
        explicit_bzero(source, sizeof *source);
}

uint32_t noise_source_take(struct noise_source *source)
{
    if (source->vectors == UINT32_MAX) { /* in every build: noise that repeats itself must never leave the process */
        fprintf(stderr, "noise source: too many vectors from one key\n");
        abort();
    }
    return source->vectors++;
}

/* One vector's work, shared by its threads. */
struct crew {
    const struct noise_source *source;
    uint32_t number;
    int64_t *vector;
    size_t count;
    atomic_size_t next_chunk;
};

static void put_u32(uint8_t *to, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        to[i] = (uint8_t)(v >> 8 * i);
}

/* Takes chunks until none is left. */
static void *crew_work(void *arg)
{
    enum { TAKE = 64 }; /* chunks at a time: 4096 coordinates, about 0.3 ms */
    struct crew *crew = arg;
    size_t chunks = crew->count / GAUSSIAN_CHUNK + (crew->count % GAUSSIAN_CHUNK != 0);
    struct random_stream stream;
    struct rng rng = random_stream_rng(&stream);
    struct noise noise;

    if (noise_init(&noise, crew->source->gaussian.variance, &rng, NULL) < 0)
        abort(); /* noise_source_init took this variance */
    for (;;) {
        size_t first = atomic_fetch_add_explicit(&crew->next_chunk, TAKE, memory_order_relaxed);
        if (first >= chunks)
            break;
        size_t end = chunks - first < TAKE ? chunks : first + TAKE;
        for (size_t c = first; c < end; c++) {
            uint8_t nonce[RANDOM_NONCE_SIZE];
            size_t at = c * GAUSSIAN_CHUNK, left = crew->count - at;
            put_u32(nonce, crew->number);
            put_u32(nonce + 4, (uint32_t)c);
            put_u32(nonce + 8, (uint32_t)((uint64_t)c >> 32));
            random_stream_nonce(&stream, crew->source->key, nonce);
            noise_restart(&noise);
            noise_add(&noise, crew->vector + at, left < GAUSSIAN_CHUNK ? left : GAUSSIAN_CHUNK);
        }
    }
    noise_release(&noise);
    random_stream_release(&stream);
    return NULL;
}

void noise_vector_add(struct noise_source *source, int64_t *vector, size_t count, int threads)
{
    struct crew crew = {.source = source, .number = noise_source_take(source), .vector = vector, .count = count};
    pthread_t others[NOISE_THREADS_MAX - 1];
    int started = 0;

    assert(threads >= 1);
    while (started < threads - 1 && started < (int)ARRAY_LEN(others) &&
           pthread_create(&others[started], NULL, crew_work, &crew) == 0)
        started++;
    crew_work(&crew); /* all of it, if no thread could be had */
    for (int i = 0; i < started; i++)
        pthread_join(others[i], NULL);
}

int noise_source_self_test(const struct rng *rng, struct error *err)
{
    /* variance 2^40, key 0, 1, … 31, vector 3 of 130 coordinates: the first and the last of each chunk */
    static const struct {
        size_t at;
        int64_t value;
    } expected[] = {{0, -281990}, {63, 1379693}, {64, 345767}, {127, 186493}, {128, -50190}, {129, -2236697}};
    struct noise_source source = {.vectors = 3};
    int64_t vector[130] = {0};
    int rc = noise_self_test(rng, err);

    if (rc < 0)
        return rc;
    for (uint8_t i = 0; i < sizeof source.key; i++)
        source.key[i] = i;
    gaussian_init(&source.gaussian, (uint64_t)1 << 40);
    noise_vector_add(&source, vector, ARRAY_LEN(vector), 2);
    for (size_t i = 0; i < ARRAY_LEN(expected); i++)
        if (vector[expected[i].at] != expected[i].value)
            return error_set(err, ERR_BUG,
                             "the noise vectors' known answer differs: this build must not release anything");
    return 0;
}
