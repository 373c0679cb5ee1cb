#include "aggregator/rounds/job_file.h"

#include "base/file.h"
#include "base/hex.h"
#include "protocol/session.h"

#include <jansson.h>

static const struct config_key keys[] = {
    {"job", CONFIG_STRING, .required = true, .example = "icd-chapters", .max = 63,
     .help = "Name of the job: a-z, 0-9 and -. A name is used once."},
    {"model.card", CONFIG_PATH, .required = true, .example = "smollm2-135m.json",
     .help = "Model card of the base model, as `consilium-node model describe PATH` prints it."},

    {"lora.layer_first", CONFIG_INT, .text = "0", .min = 0, .max = 127,
     .help = "Lowest adapted layer, from 0. Fewer layers: a shorter backward pass and a smaller update."},
    {"lora.layer_last", CONFIG_INT, .min = 0, .max = 127, .help = "Highest adapted layer. Unset: the top one."},
    {"lora.targets", CONFIG_LIST, .text = "q,v", .min = 1, .max = 7,
     .help = "Adapted linears: q, k, v, o, gate, up, down."},
    {"lora.rank", CONFIG_INT, .text = "8", .min = 1, .max = 256, .help = "Rank r of the factors."},
    {"lora.alpha", CONFIG_FLOAT, .text = "16", .min = 0.001, .max = 65536, .help = "The update is scaled by alpha/r."},
    {"lora.scaling", CONFIG_ENUM, .text = "rank", .choices = "rank|sqrt-rank", .help = "sqrt-rank: by alpha/sqrt(r)."},
    {"lora.mode", CONFIG_ENUM, .text = "ffa", .choices = "ffa|alternating",
     .help =
         "ffa: A is frozen and public, only B is trained and sent, so that averaging B averages the update exactly. "
         "alternating: B is trained and sent in the odd rounds, A in the even ones, which averages exactly too. "
         "Averaging A and B that were trained together would not; there is no such mode."},
    {"lora.seed", CONFIG_STRING, .min = 64, .max = 64,
     .help = "Public seed of the first A, 64 hexadecimal digits. Unset: drawn at submission."},

    {"rounds.count", CONFIG_INT, .text = "10", .min = 1, .max = 100000, .unit = "rounds", .help = "Rounds of the job."},
    {"rounds.min_sites", CONFIG_INT, .text = "3", .min = 3, .max = 200, .unit = "sites",
     .help = "Least number of connected sites to open a round."},
    {"rounds.train_deadline", CONFIG_DURATION, .text = "2h", .min = 1000, .max = 604800000,
     .help = "Longest wait for local training in a round."},
    {"rounds.stage_deadline", CONFIG_DURATION, .text = "5m", .min = 1000, .max = 86400000,
     .help = "Longest wait for each later stage of a round."},
    {"rounds.valid", CONFIG_DURATION, .text = "30d", .min = 60000, .max = 31536000000.0,
     .help = "The plan may not be used later than so long after its submission."},

    {"train.steps", CONFIG_INT, .text = "4", .min = 1, .max = 100000, .unit = "steps",
     .help = "Local steps in each round."},
    {"train.batch", CONFIG_INT, .text = "16", .min = 1, .max = 1000000, .unit = "records",
     .help = "Expected records of a step at each site (Poisson sampling: the sampling rate is batch / records)."},
    {"train.learning_rate", CONFIG_FLOAT, .text = "0.005", .min = 1e-8, .max = 100, .help = "Of the local optimizer."},
    {"train.optimizer", CONFIG_ENUM, .text = "adamw", .choices = "adamw|sgd",
     .help = "Local optimizer; starts anew in "
             "each round."},
    {"train.momentum", CONFIG_FLOAT, .text = "0", .min = 0, .max = 0.999, .help = "Of sgd."},
    {"train.beta1", CONFIG_FLOAT, .text = "0.9", .min = 0, .max = 0.999, .help = "Of adamw."},
    {"train.beta2", CONFIG_FLOAT, .text = "0.999", .min = 0, .max = 0.99999, .help = "Of adamw."},
    {"train.decay", CONFIG_FLOAT, .text = "0", .min = 0, .max = 1,
     .help = "The learning rate falls linearly over all steps by this fraction."},
    {"train.max_tokens", CONFIG_INT, .text = "256", .min = 8, .max = 65536, .unit = "tokens",
     .help = "Longer records are left out, whole, and counted."},
    {"train.system", CONFIG_STRING, .text = "default", .max = 1024,
     .help = "System message of every record that has none: default (the model's), none, or the text."},

    {"aggregation.optimizer", CONFIG_ENUM, .text = "fedavg", .choices = "fedavg|fedavgm", .help = "Server optimizer."},
    {"aggregation.learning_rate", CONFIG_FLOAT, .text = "1", .min = 1e-6, .max = 100,
     .help = "Of the server optimizer."},
    {"aggregation.momentum", CONFIG_FLOAT, .text = "0", .min = 0, .max = 0.999, .help = "Of fedavgm."},
    {"aggregation.update_clip", CONFIG_FLOAT, .text = "10", .min = 1e-6, .max = 1e6,
     .help = "Largest L2 norm of a site's update in a round."},
    {"aggregation.grid_bits", CONFIG_INT, .text = "20", .min = 8, .max = 30, .unit = "bits",
     .help = "Updates are rounded, at random and without bias, to multiples of 2^-grid_bits."},

    {"dp.mode", CONFIG_ENUM, .text = "record", .choices = "record|none",
     .help =
         "record: each site adds the full noise for its own records. none: sites refuse it unless their policy says "
         "otherwise."},
    {"dp.clip", CONFIG_FLOAT, .text = "1", .min = 0, .max = 1e6,
     .help = "L2 bound of one record's gradient. 0, in mode none only: no bound."},
    {"dp.epsilon", CONFIG_FLOAT, .text = "8", .min = 0.01, .max = 100, .help = "Target over all rounds, at dp.delta."},
    {"dp.delta", CONFIG_FLOAT, .text = "0.00001", .min = 1e-12, .max = 0.01, .help = "Delta of the target."},

    {"secagg.colluders", CONFIG_INT, .text = "0", .min = 0, .max = 100, .unit = "sites",
     .help = "Sites assumed to collude with the aggregator; 0 takes the default, max(1, ceil(n/3) - 1)."},
    {"secagg.honest", CONFIG_INT, .text = "0", .min = 0, .max = 100, .unit = "sites",
     .help = "Least number of honest sites in a sum; 0 takes the default."},
};

const struct config_schema job_schema = {
    "job.yaml",
    "A training job, submitted by a plan author: `consilium-aggregator job submit job.yaml --author-key FILE`.", keys,
    ARRAY_LEN(keys)};

struct card {
    uint8_t sha256[HASH_SIZE];
    int layers, width, heads, kv_heads, head_size, ff;
    int fused_gate_up; /* one matrix, and one A, for both; it counts as up */
};

static int read_card(const struct config *job, struct card *ret_card, struct error *err)
{
    const char *path = config_path(job, "model.card"), *sha256 = NULL, *architecture = NULL;
    struct card card = {0};
    struct buffer text;
    json_error_t problem;
    json_t *json = NULL;
    int rc;

    buffer_init(&text, 64 << 10);
    if ((rc = file_read(path, &text, err)) < 0) {
        rc = error_prefix(err, "%s: model.card", config_origin(job, "model.card"));
        goto out;
    }
    json = json_loadb((const char *)text.data, text.len, JSON_REJECT_DUPLICATES, &problem);
    if (!json ||
        json_unpack(json, "{s:s,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s?b}", "sha256", &sha256, "architecture", &architecture,
                    "layers", &card.layers, "width", &card.width, "heads", &card.heads, "kv_heads", &card.kv_heads,
                    "head_size", &card.head_size, "ff", &card.ff, "fused_gate_up", &card.fused_gate_up) < 0 ||
        hex_decode(sha256, card.sha256, HASH_SIZE) < 0 || card.layers < 1 || card.layers > 128 || card.width < 1 ||
        card.heads < 1 || card.kv_heads < 1 || card.head_size < 1 || card.ff < 1 || card.width > 65536 ||
        card.ff > 65536 || (int64_t)card.heads * card.head_size > 65536) {
        rc =
            error_set(err, ERR_CONFIG, "%s: not a model card; make it with `consilium-node model describe PATH`", path);
        goto out;
    }
    *ret_card = card;
out:
    json_decref(json);
    buffer_release(&text);
    return rc;
}

/* in and out features of a target by name, out 0 for one that another stands for; false for an unknown one. */
static bool target_shape(const struct card *card, const char *name, uint64_t *in, uint64_t *out)
{
    uint64_t width = (uint64_t)card->width, q = (uint64_t)card->heads * (uint64_t)card->head_size,
             kv = (uint64_t)card->kv_heads * (uint64_t)card->head_size, ff = (uint64_t)card->ff,
             gate = card->fused_gate_up ? 0 : ff, up = card->fused_gate_up ? 2 * ff : ff;
    const struct {
        const char *name;
        uint64_t in, out;
    } shapes[] = {{"q", width, q},       {"k", width, kv},  {"v", width, kv},   {"o", q, width},
                  {"gate", width, gate}, {"up", width, up}, {"down", ff, width}};

    for (size_t i = 0; i < ARRAY_LEN(shapes); i++) {
        if (strcmp(shapes[i].name, name) == 0) {
            *in = shapes[i].in;
            *out = shapes[i].out;
            return true;
        }
    }
    return false;
}

/* Values of the adapter's A and B sections. */
static void count_sections(const struct config *job, const struct card *card, uint64_t layers, uint64_t *ret_a,
                           uint64_t *ret_b)
{
    const uint64_t rank = (uint64_t)config_int(job, "lora.rank");
    uint64_t a = 0, b = 0, in, out;

    for (size_t i = 0; i < config_list_count(job, "lora.targets"); i++) {
        const char *name = config_list_item(job, "lora.targets", i);
        if (!target_shape(card, name, &in, &out))
            continue; /* refused before */
        b += layers * rank * out;
        if (!card->fused_gate_up || strcmp(name, "gate") != 0)
            a += layers * rank * in;
    }
    *ret_a = a;
    *ret_b = b;
}

/* The text that node/train/adapter_config.h reads, the state's size and where it is cut. Targets come out in the
 * canonical order. */
static int lora_text(const struct config *job, const struct card *card, const struct rng *rng, struct job_plan *plan,
                     uint64_t *ret_words, struct error *err)
{
    static const char *const order[] = {"q", "k", "v", "o", "gate", "up", "down"};
    int64_t first = config_int(job, "lora.layer_first"), rank = config_int(job, "lora.rank");
    int64_t last = config_is_set(job, "lora.layer_last") ? config_int(job, "lora.layer_last") : card->layers - 1;
    char targets[64] = "", seed[65];
    uint8_t random[32];
    uint64_t a, b, in, out;
    size_t found = 0;

    if (last >= card->layers || first > last)
        return config_fail(job, "lora.layer_first", err, "layers %lld to %lld; the model has 0 to %d", (long long)first,
                           (long long)last, card->layers - 1);
    for (size_t i = 0; i < config_list_count(job, "lora.targets"); i++) {
        const char *name = config_list_item(job, "lora.targets", i);
        if (!target_shape(card, name, &in, &out))
            return config_fail(job, "lora.targets", err, "'%s' is none of q, k, v, o, gate, up, down", name);
        for (size_t j = 0; j < i; j++)
            if (strcmp(name, config_list_item(job, "lora.targets", j)) == 0)
                return config_fail(job, "lora.targets", err, "%s is named twice", name);
    }
    for (size_t t = 0; t < ARRAY_LEN(order); t++) {
        for (size_t i = 0; i < config_list_count(job, "lora.targets"); i++) {
            if (strcmp(order[t], config_list_item(job, "lora.targets", i)) != 0)
                continue;
            snprintf(targets + strlen(targets), sizeof targets - strlen(targets), "%s%s", found++ ? "," : "", order[t]);
        }
    }
    if (card->fused_gate_up && strstr(targets, "gate") && !strstr(targets, "up"))
        return config_fail(job, "lora.targets", err,
                           "this model holds gate and up as one matrix: name both or neither");
    if (config_is_set(job, "lora.seed")) {
        snprintf(seed, sizeof seed, "%s", config_string(job, "lora.seed"));
        if (hex_decode(seed, random, sizeof random) < 0)
            return config_fail(job, "lora.seed", err, "expected 64 hexadecimal digits");
    } else {
        rng_fill(rng, random, sizeof random);
    }
    hex_encode(random, sizeof random, seed);
    plan->lora_len =
        (uint32_t)snprintf((char *)plan->lora, sizeof plan->lora,
                           "layers=%lld-%lld;targets=%s;rank=%lld;alpha=%.17g;scaling=%s;mode=%s;seed=%s",
                           (long long)first, (long long)last, targets, (long long)rank, config_float(job, "lora.alpha"),
                           config_string(job, "lora.scaling"), config_string(job, "lora.mode"), seed);
    count_sections(job, card, (uint64_t)(last - first + 1), &a, &b);
    if (strcmp(config_string(job, "lora.mode"), "alternating") == 0)
        plan->split_words = a;
    *ret_words = plan->split_words + b;
    return 0;
}

static void train_section(const struct config *job, struct plan_train *train)
{
    bool sgd = strcmp(config_string(job, "train.optimizer"), "sgd") == 0;

    snprintf(train->optimizer, sizeof train->optimizer, "%s", config_string(job, "train.optimizer"));
    train->learning_rate = config_float(job, "train.learning_rate");
    train->local_steps = (uint32_t)config_int(job, "train.steps");
    train->batch = (uint32_t)config_int(job, "train.batch");
    train->max_len = (uint32_t)config_int(job, "train.max_tokens");
    if (sgd)
        snprintf(train->options, sizeof train->options, "momentum=%.9g;decay=%.9g;system=%s",
                 config_float(job, "train.momentum"), config_float(job, "train.decay"),
                 config_string(job, "train.system"));
    else
        snprintf(train->options, sizeof train->options, "beta1=%.9g;beta2=%.9g;decay=%.9g;system=%s",
                 config_float(job, "train.beta1"), config_float(job, "train.beta2"), config_float(job, "train.decay"),
                 config_string(job, "train.system"));
}

int job_file_plan(const struct config *job, const struct rng *rng, int64_t now_s, struct job_plan *ret_plan,
                  uint64_t *ret_words, struct error *err)
{
    struct job_plan plan = {0};
    struct card card;
    uint64_t words = 0;
    int rc;

    if (!session_id_valid(config_string(job, "job")))
        return config_fail(job, "job", err, "'%s' is not a job name: 1 to 63 of a-z, 0-9 and -",
                           config_string(job, "job"));
    snprintf(plan.job, sizeof plan.job, "%s", config_string(job, "job"));
    if ((rc = read_card(job, &card, err)) < 0 || (rc = lora_text(job, &card, rng, &plan, &words, err)) < 0)
        return rc;
    memcpy(plan.base_hash, card.sha256, HASH_SIZE);
    plan.rounds = (uint32_t)config_int(job, "rounds.count");
    plan.min_sites = (uint32_t)config_int(job, "rounds.min_sites");
    train_section(job, &plan.train);
    if (strcmp(config_string(job, "dp.mode"), "record") == 0) {
        double clip = config_float(job, "dp.clip");
        if (!(clip > 0))
            return config_fail(job, "dp.clip", err, "must be above 0 in mode record");
        plan.dp = (struct plan_dp){.mode = PLAN_DP_RECORD,
                                   .clip = clip,
                                   .delta = config_float(job, "dp.delta"),
                                   .target_epsilon = config_float(job, "dp.epsilon"),
                                   .grid = 0x1p20 / clip,
                                   .steps = (uint64_t)plan.rounds * plan.train.local_steps};
    } else {
        plan.dp = (struct plan_dp){.mode = PLAN_DP_NONE, .clip = config_float(job, "dp.clip")};
    }
    plan.aggregation = (struct plan_aggregation){
        .update_clip = config_float(job, "aggregation.update_clip"),
        .ring_bits = 32,
        .grid_bits = (uint32_t)config_int(job, "aggregation.grid_bits"),
        .optimizer = {.kind = strcmp(config_string(job, "aggregation.optimizer"), "fedavgm") == 0 ? SERVER_FEDAVGM
                                                                                                  : SERVER_FEDAVG,
                      .lr = (float)config_float(job, "aggregation.learning_rate"),
                      .momentum = (float)config_float(job, "aggregation.momentum")}};
    plan.c = (uint32_t)config_int(job, "secagg.colluders");
    plan.m = (uint32_t)config_int(job, "secagg.honest");
    plan.train_deadline_s = (uint32_t)(config_duration_ms(job, "rounds.train_deadline") / 1000);
    plan.stage_deadline_s = (uint32_t)(config_duration_ms(job, "rounds.stage_deadline") / 1000);
    plan.not_after_s = now_s + config_duration_ms(job, "rounds.valid") / 1000;
    if ((rc = job_plan_check(&plan, err)) < 0)
        return rc;
    *ret_plan = plan;
    *ret_words = words;
    return 0;
}
