#include "node/jobs/local_plan.h"

#include "privacy/accountant.h"
#include "runtime/text.h"

#include <math.h>

void local_plan_system_message(const char *options, char *out, size_t size)
{
    const char *at = strncmp(options, "system=", 7) == 0 ? options : strstr(options, ";system=");

    if (at && *at == ';')
        at++;
    snprintf(out, size, "%s", at ? at + strlen("system=") : "default");
}

/* plan.train.options: "key=value;…;system=TEXT", the system message last since it may hold anything. */
static int parse_options(struct local_plan *local, const char *options, struct error *err)
{
    char copy[PLAN_TEXT_MAX];
    char *cursor = copy;

    snprintf(copy, sizeof copy, "%s", options);
    local_plan_system_message(options, local->system_message, sizeof local->system_message);
    while (*cursor) {
        char *value = strchr(cursor, '='), *end;
        double number;
        if (!value)
            return error_set(err, ERR_CONFIG, "the job's training options: expected key=value");
        *value++ = 0;
        if (strcmp(cursor, "system") == 0)
            return 0; /* the rest of the text is the message */
        end = strchr(value, ';');
        if (end)
            *end = 0;
        if (text_parse_float(value, &number) < 0)
            return error_set(err, ERR_CONFIG, "the job's training options: %s is not a number", cursor);
        if (strcmp(cursor, "momentum") == 0)
            local->optimizer.momentum = (float)number;
        else if (strcmp(cursor, "beta1") == 0)
            local->optimizer.beta1 = (float)number;
        else if (strcmp(cursor, "beta2") == 0)
            local->optimizer.beta2 = (float)number;
        else if (strcmp(cursor, "weight_decay") == 0)
            local->optimizer.weight_decay = (float)number;
        else if (strcmp(cursor, "decay") == 0 && number >= 0 && number <= 1)
            local->decay = number;
        else
            return error_set(err, ERR_CONFIG, "the job's training options: '%s' is not known to this version", cursor);
        cursor = end ? end + 1 : value + strlen(value);
    }
    return 0;
}

static int set_optimizer(struct local_plan *local, const struct job_plan *plan, struct error *err)
{
    local->optimizer =
        (struct optimizer_config){.lr = (float)plan->train.learning_rate, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f};
    if (strcmp(plan->train.optimizer, "adamw") == 0)
        local->optimizer.kind = OPTIMIZER_ADAMW;
    else if (strcmp(plan->train.optimizer, "sgd") == 0)
        local->optimizer.kind = OPTIMIZER_SGD;
    else
        return error_set(err, ERR_CONFIG, "the job's optimizer '%s' is not known to this version (adamw, sgd)",
                         plan->train.optimizer);
    return parse_options(local, plan->train.options, err);
}

int local_plan_make(struct local_plan *ret_local, const struct job_plan *plan, uint64_t declared_records,
                    uint64_t dimensions, struct error *err)
{
    struct local_plan local = {0};
    uint64_t steps = (uint64_t)plan->rounds * plan->train.local_steps;
    double q = plan->dp.sampling_rate;
    int rc = set_optimizer(&local, plan, err);

    if (rc < 0)
        return rc;
    if (declared_records == 0)
        return error_set(err, ERR_CONFIG, "this site has no training records: set data.path in node.yaml");
    if (!(q > 0))
        q = plan->train.batch >= declared_records ? 1.0 : (double)plan->train.batch / (double)declared_records;
    local.dp = (struct dp_plan){.mode = plan->dp.mode == PLAN_DP_RECORD ? DP_RECORD : DP_NONE,
                                .neighbour = DP_ADD_REMOVE,
                                .unit = "record",
                                .q = q,
                                .z = plan->dp.noise_multiplier,
                                .clip = plan->dp.clip,
                                .grid_clip = DP_GRID_CLIP,
                                .steps_per_round = plan->train.local_steps,
                                .rounds = plan->rounds,
                                .delta = plan->dp.delta,
                                .epsilon = plan->dp.target_epsilon,
                                .units = declared_records,
                                .dimensions = dimensions};
    if (local.dp.mode == DP_RECORD) {
        if (!(fabs(plan->dp.grid * plan->dp.clip - DP_GRID_CLIP) <= 0.5))
            return error_set(err, ERR_CONFIG,
                             "the job's dp.grid is %g steps per unit, this version trains with %g at clip %g",
                             plan->dp.grid, DP_GRID_CLIP / plan->dp.clip, plan->dp.clip);
        if (!(local.dp.z > 0) &&
            (rc = accountant_calibrate(local.dp.epsilon, local.dp.delta, q, steps, &local.dp.z, err)) < 0)
            return rc;
        if ((rc = dp_plan_check(&local.dp, err)) < 0)
            return rc;
    }
    *ret_local = local;
    return 0;
}
