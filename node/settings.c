#include "node/settings.h"

#include "base/file.h"

static const struct config_key keys[] = {
    {"site", CONFIG_STRING, .required = true, .example = "clinic-a", .max = 63,
     .help = "Name of this site in the federation: a-z, 0-9 and -."},
    {"state", CONFIG_PATH, .required = true, .example = "state",
     .help = "Folder for keys, the privacy ledger, adapters and the journal. Only this user may read it."},

    {"aggregator.url", CONFIG_STRING, .required = true, .example = "tcp://aggregator.example.org:7400", .max = 300,
     .help = "Where the aggregator listens. The site only connects outwards, to this one port."},
    {"aggregator.federation", CONFIG_STRING, .required = true, .example = "rare-diseases", .max = 63,
     .help = "Name of the federation; it must stand in the aggregator's certificate."},

    {"model.path", CONFIG_PATH, .required = true, .example = "SmolLM2-135M-Instruct.Q4_1.gguf",
     .help = "Base model, a GGUF file or a Hugging Face folder. Jobs name its hash (`model describe` shows it)."},

    {"device.kind", CONFIG_STRING, .text = "auto", .max = 16,
     .help = "Where to compute: auto (an NVIDIA card if one can be used, the CPU otherwise), cpu, cuda or cuda:N."},
    {"device.memory_limit_mb", CONFIG_INT, .text = "0", .min = 0, .max = 1048576, .unit = "MB",
     .help = "Most memory of the card for each of training and answering. 0: what it has free."},
    {"device.quantise_kv", CONFIG_BOOL, .text = "false",
     .help = "On a card, keep a conversation's keys and values as 8-bit integers: half the memory, answers a little "
             "less exact."},
    {"device.threads", CONFIG_INT, .text = "1", .min = 1, .max = 256, .unit = "threads",
     .help = "CPU threads for training and answering."},
    {"device.instructions", CONFIG_ENUM, .text = "auto", .choices = "auto|scalar|avx2|avx512|avx512-vnni|avx512-bf16",
     .help = "Best instruction set to use; auto takes what the CPU has."},
    {"device.precision", CONFIG_ENUM, .text = "bf16", .choices = "bf16|f32",
     .help =
         "bf16: products with frozen weights multiply bfloat16, or on CPUs that have VNNI instead, integers of under "
         "half its error; on a card activations are bfloat16 too. f32: all in float32. Sums are always 32-bit."},
    {"device.batch_tokens", CONFIG_INT, .text = "0", .min = 0, .max = 65536, .unit = "tokens",
     .help =
         "Rows of a micro-batch; bounds the memory of a training step, never its result. 0: 512 on the CPU, 16384 on "
         "a card, or as many as its memory allows."},

    {"data.path", CONFIG_PATH, .example = "records.jsonl",
     .help = "Training records, JSON lines {\"messages\": [...]}. A site without it evaluates and serves only."},
    {"data.declared_records", CONFIG_INT, .min = 1, .max = 4294967295.0, .unit = "records",
     .help =
         "Number of records that this site declares; it is public and fixes the sampling rate and the denominators. "
         "Unset: as many as the file has at the first use."},

    {"policy.consent", CONFIG_ENUM, .text = "ask", .choices = "ask|within-policy",
     .help =
         "ask: a person approves each job with `consilium-node consent approve`. within-policy: a job that keeps this "
         "policy may start."},
    {"policy.allow_without_dp", CONFIG_BOOL, .text = "false",
     .help = "Accept jobs without differential privacy. Their updates may reveal single records to whoever gets the "
             "adapter."},
    {"policy.max_epsilon", CONFIG_FLOAT, .text = "8", .min = 0.01, .max = 100, .unit = "epsilon",
     .help = "Privacy budget of this site over all jobs, at policy.delta. Enforced on disk before any record is read."},
    {"policy.delta", CONFIG_FLOAT, .text = "0.00001", .min = 1e-12, .max = 0.01, .unit = "probability",
     .help = "Delta of the budget; fixed when the ledger is created."},
    {"policy.min_sites", CONFIG_INT, .text = "3", .min = 3, .max = 200, .unit = "sites",
     .help = "Least number of sites invited to a round that this site takes part in."},
    {"policy.min_colluders", CONFIG_INT, .text = "0", .min = 0, .max = 100, .unit = "sites",
     .help = "Least number of colluding sites that a job must assume. 0: the default for the number of sites invited."},
    {"policy.min_honest", CONFIG_INT, .text = "0", .min = 0, .max = 100, .unit = "sites",
     .help = "Least number of honest sites in every sum. 0: the default for the number of sites invited."},
    {"policy.hours", CONFIG_LIST, .max = 16, .example = "",
     .help = "Hours of the day, local time, in which training may start, as \"22:00-06:00\". Unset: always."},

    {"serve.listen", CONFIG_STRING, .example = "unix:/run/consilium/serve.sock", .max = 300,
     .help = "Where the OpenAI-compatible endpoint listens: unix:/path or a loopback host:port. Unset: not served."},
    {"serve.token_file", CONFIG_PATH,
     .help = "First line is the bearer token that clients must send; needed when listening on TCP."},
    {"serve.context_tokens", CONFIG_INT, .text = "2048", .min = 64, .max = 131072, .unit = "tokens",
     .help = "Longest conversation, prompt and answer together."},

    {"log.level", CONFIG_ENUM, .text = "info", .choices = "debug|info|warn|error", .help = "Least level on stderr."},
};

const struct config_schema node_schema = {
    "node.yaml",
    "Configuration of consilium-node, the daemon of one site. Relative paths are taken from this file's folder.\n"
    "Every key may also come from the environment: policy.max_epsilon is CONSILIUM_POLICY_MAX_EPSILON.",
    keys, ARRAY_LEN(keys)};

void node_path(const struct config *config, const char *name, char out[NODE_PATH_SIZE])
{
    file_join(out, NODE_PATH_SIZE, config_path(config, "state"), name);
}

int node_lock(const struct config *config, int *ret_lock, struct error *err)
{
    char path[NODE_PATH_SIZE];
    int rc;

    node_path(config, "lock", path);
    if ((rc = file_lock(path, ret_lock, err)) == ERR_AGAIN)
        rc = error_set(err, ERR_RESOURCES,
                       "another consilium-node runs with the state folder %s: stop it first, or give this one its own",
                       config_path(config, "state"));
    return rc;
}
