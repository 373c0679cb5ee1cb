#include "node/jobs/policy.h"

#include "base/hex.h"

#include <time.h>

int policy_check_plan(const struct config *config, const struct job_plan *plan, const uint8_t base_hash[HASH_SIZE],
                      struct error *err)
{
    double budget = config_float(config, "policy.max_epsilon"), delta = config_float(config, "policy.delta");
    char want[2 * HASH_SIZE + 1], have[2 * HASH_SIZE + 1];

    if (memcmp(plan->base_hash, base_hash, HASH_SIZE) != 0) {
        hex_encode(plan->base_hash, HASH_SIZE, want);
        hex_encode(base_hash, HASH_SIZE, have);
        return error_set(err, ERR_CONFIG, "job %s wants the base model %.16s..., model.path is %.16s...", plan->job,
                         want, have);
    }
    if (plan->dp.mode == PLAN_DP_NONE) {
        if (!config_bool(config, "policy.allow_without_dp"))
            return error_set(err, ERR_POLICY,
                             "job %s trains without differential privacy; this site's policy.allow_without_dp is false",
                             plan->job);
        return 0;
    }
    if (plan->dp.target_epsilon > budget)
        return error_set(err, ERR_POLICY, "job %s may spend epsilon %.3g; this site's policy.max_epsilon is %.3g",
                         plan->job, plan->dp.target_epsilon, budget);
    if (plan->dp.delta > delta)
        return error_set(err, ERR_POLICY, "job %s counts with delta %.3g; this site's policy.delta is %.3g", plan->job,
                         plan->dp.delta, delta);
    return 0;
}

/* "HH:MM" at text; -1 if it is not a time of day. */
static int minute_of_day(const char *text)
{
    int hour, minute;

    for (int i = 0; i < 5; i++)
        if (i == 2 ? text[i] != ':' : text[i] < '0' || text[i] > '9')
            return -1;
    hour = (text[0] - '0') * 10 + text[1] - '0';
    minute = (text[3] - '0') * 10 + text[4] - '0';
    return hour < 24 && minute < 60 ? hour * 60 + minute : -1;
}

int policy_check_hours(const struct config *config, const struct clock *clock, struct error *err)
{
    size_t n = config_list_count(config, "policy.hours");
    time_t now = (time_t)(clock_wall_ms(clock) / 1000);
    struct tm local;
    int minute;

    if (n == 0)
        return 0;
    localtime_r(&now, &local);
    minute = local.tm_hour * 60 + local.tm_min;
    for (size_t i = 0; i < n; i++) {
        const char *text = config_list_item(config, "policy.hours", i);
        int from, to;
        if (strlen(text) != 11 || text[5] != '-' || (from = minute_of_day(text)) < 0 ||
            (to = minute_of_day(text + 6)) < 0)
            return config_fail(config, "policy.hours", err, "'%s' is not HH:MM-HH:MM", text);
        if (from <= to ? minute >= from && minute < to : minute >= from || minute < to)
            return 0;
    }
    return error_set(err, ERR_POLICY, "it is %02d:%02d here; policy.hours allows training in %s%s", local.tm_hour,
                     local.tm_min, config_list_item(config, "policy.hours", 0), n > 1 ? " and other hours" : "");
}

struct secagg_policy policy_secagg(const struct config *config)
{
    return (struct secagg_policy){.sites_min = (uint32_t)config_int(config, "policy.min_sites"),
                                  .colluders_min = (uint32_t)config_int(config, "policy.min_colluders"),
                                  .honest_min = (uint32_t)config_int(config, "policy.min_honest"),
                                  .allow_no_dp = config_bool(config, "policy.allow_without_dp")};
}
