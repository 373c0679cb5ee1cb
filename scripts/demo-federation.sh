# Sourced by demo.sh: sets up federations with the programs' own commands, starts and watches their daemons, and puts the
# report together from their journals.
# shellcheck shell=bash disable=SC2154 # variables of demo.sh

declare -A supervisor_of=() # "federation/site" -> pid of the loop that keeps its daemon running
port=$((17000 + $$ % 20000))

aggregator() { local federation=$1; shift; "$bin/consilium-aggregator" -c "$work/$federation/aggregator.yaml" "$@"; }
node() { local federation=$1 site=$2; shift 2; "$bin/consilium-node" -c "$work/$federation/$site.yaml" "$@"; }

# write_configs FEDERATION MODE: aggregator.yaml, one node yaml a site, job.yaml
write_configs() {
    local federation=$1 mode=$2 dir=$work/$1 i
    mkdir -p "$dir"
    cat >"$dir/aggregator.yaml" <<YAML
version: 1
federation: demo
state: aggregator
listen: {url: "tcp://127.0.0.1:$port", names: [127.0.0.1]}
round: {gather: 20s, liveness: 30s, grace: 3s}
YAML
    for i in "${!names[@]}"; do
        cat >"$dir/${names[i]}.yaml" <<YAML
version: 1
site: ${names[i]}
state: ${names[i]}
aggregator: {url: "tcp://127.0.0.1:$port", federation: demo}
model: {path: "$MODEL"}
device: {threads: 1}
data: {path: "${files[i]}"}
policy: {consent: within-policy, max_epsilon: 8, delta: 0.00001, allow_without_dp: $([ "$mode" = none ] && echo true || echo false)}
serve: {listen: "unix:$dir/${names[i]}.sock"}
YAML
    done
    "$bin/consilium-node" model describe "$MODEL" >"$dir/model.json" || die "$MODEL cannot be used"
    layer_first=$(jq "[.layers - 10, 0] | max" "$dir/model.json")
    cat >"$dir/job.yaml" <<YAML
version: 1
job: demo
model: {card: model.json}
lora: {layer_first: $layer_first, targets: [$targets], rank: $rank, alpha: $alpha, mode: ffa}
rounds: {count: $rounds, min_sites: $n, train_deadline: 10m, stage_deadline: 30s}
train: {steps: $steps, batch: $batch, learning_rate: $learning_rate, optimizer: $optimizer, decay: $decay, max_tokens: $max_tokens, system: none}
aggregation: {optimizer: $server_optimizer, learning_rate: $server_learning_rate, momentum: $server_momentum, update_clip: 100, grid_bits: 16}
dp: {mode: $mode, clip: $clip, epsilon: 8, delta: 0.00001}
YAML
    [ "$mode" = record ] || sed -i "/^dp:/d; \$a dp: {mode: none, clip: $clip}" "$dir/job.yaml"
}

# enrol FEDERATION: what docs/first-federation.md tells people to do by hand
enrol() {
    local federation=$1 dir=$work/$1 site ca_fingerprint governance_fingerprint
    "$bin/consilium-governance" key "$dir/governance.key" --format json >"$dir/governance.json"
    "$bin/consilium-governance" key "$dir/author.key" >/dev/null
    aggregator "$federation" init --format json >"$dir/init.json"
    for site in "${names[@]}"; do
        node "$federation" "$site" init >/dev/null
        aggregator "$federation" ca approve "$dir/$site/site.csr" --out "$dir/$site.crt" --yes >/dev/null
    done
    aggregator "$federation" roster draft --authors "$dir/author.key.pub" --out "$dir/roster.json" >/dev/null
    "$bin/consilium-governance" sign "$dir/roster.json" --key "$dir/governance.key" --out "$dir/roster.bin" --yes \
        >/dev/null 2>"$dir/roster.txt"
    aggregator "$federation" roster install "$dir/roster.bin" --governance "$dir/governance.key.pub" >/dev/null
    ca_fingerprint=$(jq -r .ca_fingerprint "$dir/init.json")
    governance_fingerprint=$(jq -r .fingerprint "$dir/governance.json")
    for site in "${names[@]}"; do
        node "$federation" "$site" enroll --certificate "$dir/$site.crt" --ca "$dir/aggregator/ca.crt" \
            --roster "$dir/roster.bin" --governance "$dir/governance.key.pub" \
            --ca-fingerprint "$ca_fingerprint" --governance-fingerprint "$governance_fingerprint" >/dev/null
    done
}

# supervise FEDERATION SITE: keeps the site's daemon running, as an init system would; a killed one starts again.
supervise() {
    local federation=$1 site=$2 dir=$work/$1 pid='' crash=${3:-}
    trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null; wait; exit 0' TERM
    while :; do
        CONSILIUM_CRASH_AT=$crash "$bin/consilium-node" -c "$dir/$site.yaml" run 2>>"$dir/$site.log" &
        pid=$!
        wait "$pid" 2>/dev/null && break # bash would add a line of its own about the kill
        crash=''
        echo "$(date -u +%T) $site died and is started again" >>"$dir/supervisor.log"
        printf '\n-- %s was killed; starting it again\n' "$site" >&2
        sleep 1
    done
}

start_federation() { # FEDERATION [CRASHING_SITE CRASH_POINT]
    local federation=$1 dir=$work/$1 site
    "$bin/consilium-aggregator" -c "$dir/aggregator.yaml" run 2>"$dir/aggregator.log" &
    supervisor_of[$federation/aggregator]=$!
    for site in "${names[@]}"; do
        if [ "$site" = "${2:-}" ]; then supervise "$federation" "$site" "$3" & else supervise "$federation" "$site" & fi
        supervisor_of[$federation/$site]=$!
    done
}

stop_federation() {
    local key
    for key in "${!supervisor_of[@]}"; do
        [[ $key == "$1"/* ]] || continue
        kill "${supervisor_of[$key]}" 2>/dev/null || true
        wait "${supervisor_of[$key]}" 2>/dev/null || true
        unset "supervisor_of[$key]"
    done
}

stop_all() {
    local key
    for key in "${!supervisor_of[@]}"; do kill "${supervisor_of[$key]}" 2>/dev/null || true; done
    wait 2>/dev/null || true
}

show_failure() { # the daemons' last words
    local federation=$1 log
    for log in "$work/$federation"/*.log; do
        [ -s "$log" ] || continue
        printf '%s:\n' "$log" >&2
        tail -n 5 "$log" >&2
    done
}

show_skipped() { # which lines of its file a site could not use; counts and line numbers, no content
    local log
    for log in "$work/$1"/site-*.log; do
        jq -rR 'fromjson? | .message? | select(type == "string" and test("lines? skipped"))' "$log" | sort -u >&2
    done
}

# run_federation NAME MODE: from nothing to the job's last version, the daemons left running
run_federation() {
    local federation=$1 mode=$2 victim='' point=''
    port=$((port + 1))
    write_configs "$federation" "$mode"
    enrol "$federation"
    if [ "$federation" = main ] && [ "$n" -gt 3 ]; then
        victim=${names[2]} point=masked-acknowledged:$(((rounds + 1) / 2))
        say "training: $n sites, $rounds rounds; $victim will be killed after its masked vector is acknowledged in round ${point#*:}"
    else
        say "training: $n sites, $rounds rounds, dp $mode"
    fi
    start_federation "$federation" "$victim" "$point"
    aggregator "$federation" job submit "$work/$federation/job.yaml" --author-key "$work/$federation/author.key" >/dev/null
    # in the background, so that a SIGTERM of this script stops it as it stops the daemons
    "$bin/consilium-aggregator" -c "$work/$federation/aggregator.yaml" job watch demo --format json \
        >"$work/$federation/job.json" &
    supervisor_of[$federation/watch]=$!
    wait $! || { show_failure "$federation"; die "the job did not end well"; }
    unset "supervisor_of[$federation/watch]"
    show_skipped "$federation"
}

# evaluate_with FEDERATION NAME ARGUMENTS...: one accuracy, as JSON beside the federation
evaluate_with() {
    local federation=$1 name=$2
    shift 2
    say "evaluating: $name"
    CONSILIUM_DEVICE_THREADS=$cores node "$federation" "${names[0]}" eval --data "$data/eval.jsonl" --system none \
        --records "$eval_records" --format json "$@" >"$work/eval-$name.json" || die "evaluation of $name failed"
}

evaluate_federation() {
    evaluate_with main base --base
    evaluate_with main federated
}

ask_question() {
    local federation=$1 expected got
    head -n 1 "$data/eval.jsonl" | jq '.messages[0].content' >"$work/prompt.json"
    say "asking the served adapter at ${names[0]}"
    jq -n --slurpfile prompt "$work/prompt.json" \
        '{messages: [{role: "user", content: $prompt[0]}], max_tokens: 24, temperature: 0}' |
        curl -sS --fail-with-body --max-time 60 --unix-socket "$work/$federation/${names[0]}.sock" \
            -H 'Content-Type: application/json' --data-binary @- http://localhost/v1/chat/completions \
            >"$work/answer.json" || die "the served adapter did not answer: $(cat "$work/answer.json")"
    expected=$(aggregator "$federation" model list demo --format json | jq -r '.[-1].adapter_sha256')
    got=$(jq -r .consilium.adapter_sha256 "$work/answer.json")
    [ "$got" = "$expected" ] || die "the answer came from adapter $got, the last signed one is $expected"
}

# --- comparisons ----------------------------------------------------------------------------------------------------------

# Every hospital alone: the same number of steps and the same DP, on throwaway state.
run_alone() {
    local i best='' accuracy dir=$work/alone seed lora
    mkdir -p "$dir"
    seed=$(printf demo | sha256sum | cut -d' ' -f1)
    lora="layers=$layer_first-$(($(jq .layers "$work/main/model.json") - 1));targets=$targets;rank=$rank;alpha=$alpha;scaling=rank;mode=ffa;seed=$seed"
    for i in "${!names[@]}"; do
        say "alone: ${names[i]}"
        sed "s|^state: .*|state: alone-${names[i]}|" "$work/main/${names[i]}.yaml" >"$dir/${names[i]}.yaml"
        CONSILIUM_DEVICE_THREADS=$cores "$bin/consilium-node" -c "$dir/${names[i]}.yaml" train --local --lora "$lora" \
            --rounds "$rounds" --steps "$steps" --batch "$batch" --optimizer "$optimizer" \
            --learning-rate "$learning_rate" --options "$local_options" --max-tokens "$max_tokens" --clip "$clip" \
            --epsilon 8 --out "$dir/${names[i]}.peft" --format json >"$dir/${names[i]}.json" ||
            die "training of ${names[i]} alone failed"
        evaluate_with main "alone-${names[i]}" --adapter "$dir/${names[i]}.peft"
        accuracy=$(jq .accuracy "$work/eval-alone-${names[i]}.json")
        if [ -z "$best" ] || jq -en "$accuracy > $best" >/dev/null; then
            best=$accuracy
            cp "$work/eval-alone-${names[i]}.json" "$work/eval-best_single_site.json"
        fi
    done
}

run_comparisons() {
    stop_federation main
    run_alone
    run_federation nodp none
    evaluate_with nodp federated_no_dp
    stop_federation nodp
}

# --- report ---------------------------------------------------------------------------------------------------------------

accuracy_of() { [ -f "$work/eval-$1.json" ] && jq .accuracy "$work/eval-$1.json" || echo null; }

write_report() {
    local dir=$work/main i epsilon=0
    for i in "${!names[@]}"; do
        node main "${names[i]}" privacy report --format json >"$dir/${names[i]}.privacy.json" || die "no privacy report"
    done
    epsilon=$(jq -s 'map(.epsilon_spent) | max' "$dir"/*.privacy.json)
    # shellcheck disable=SC2016 # jq's variables
    jq -n --slurpfile agg "$dir/aggregator/journal.jsonl" --slurpfile answer "$work/answer.json" \
        --slurpfile prompt "$work/prompt.json" --slurpfile evaluation "$work/eval-federated.json" \
        --argjson sites "$n" --arg model "$(basename "$MODEL")" \
        --argjson seconds "$(((ended - started) / 1000000))" \
        --argjson epsilon "$epsilon" --argjson base "$(accuracy_of base)" --argjson federated "$(accuracy_of federated)" \
        --argjson single "$(accuracy_of best_single_site)" --argjson nodp "$(accuracy_of federated_no_dp)" \
        --slurpfile privacy <(cat "$dir"/*.privacy.json) \
        --argjson killed "$([ -s "$dir/supervisor.log" ] && echo true || echo false)" '
        ($agg | map(select(.event == "version_signed"))) as $versions
        | ($agg | map(select(.event == "site_bytes" and .survivor))) as $bytes
        | ($agg | map(select(.event == "round_opened"))) as $opened
        | ($agg | map(select(.event == "version_withdrawn"))) as $withdrawn
        | {sites: $sites, rounds: (($versions | length) - ($withdrawn | length)), model: $model, train_records: ($privacy | map(.declared_records) | add),
           accuracy: ({majority: $evaluation[0].majority, base: $base, federated: $federated}
               + (if $single == null then {} else {best_single_site: $single, federated_no_dp: $nodp} end)),
           evaluation: {records: $evaluation[0].records, answers: $evaluation[0].answers, scorer: $evaluation[0].scorer},
           privacy: {mode: "record", epsilon: $epsilon, delta: ($privacy | map(.delta) | max)},
           secagg: {cohort: ($opened | map(.cohort) | max), threshold: ($opened | map(.threshold) | max),
               dropouts_recovered: ($versions | map(.dropouts_recovered) | add),
               survivors: ($versions | map(.survivors)),
               upload_bytes_per_site_round: (($bytes | map(.bytes_up) | add / length) | floor),
               download_bytes_per_site_round: (($bytes | map(.bytes_down) | add / length) | floor)},
           site_killed: $killed,
           stage_seconds: ($agg | map(select(.event == "stage_done")) | group_by(.stage)
               | map({key: .[0].stage, value: (map(.seconds) | add * 1000 | floor / 1000)}) | from_entries),
           seconds: ($seconds / 1000),
           answer: {prompt: $prompt[0], text: $answer[0].choices[0].message.content,
               adapter_version: $answer[0].consilium.adapter_version,
               adapter_sha256: $answer[0].consilium.adapter_sha256}}' >"$work/report.json" ||
        die "the report could not be put together"
}

print_table() {
    jq -r '
        def pct: (. * 1000 | round) as $p | "\($p / 10 | floor).\($p % 10) %";
        "",
        "accuracy on \(.evaluation.records) records (\(.evaluation.scorer))",
        "  majority class               \(.accuracy.majority | pct)",
        "  base model                   \(.accuracy.base | pct)",
        "  federated, with DP           \(.accuracy.federated | pct)",
        (if .accuracy.best_single_site then "  best site alone, same DP     \(.accuracy.best_single_site | pct)",
            "  federated without DP         \(.accuracy.federated_no_dp | pct)   (outside the claimed epsilon)" else empty end),
        "privacy      epsilon \(.privacy.epsilon * 1000 | round / 1000) at delta \(.privacy.delta), per record, by each site'"'"'s own ledger",
        "sites        \(.sites), threshold \(.secagg.threshold), survivors per round \(.secagg.survivors | map(tostring) | join(" "))",
        (if .site_killed then "             one was killed after its upload; dropouts whose masks were removed: \(.secagg.dropouts_recovered)"
            elif .sites == 3 then "             three sites tolerate no dropout, so none was killed"
            else "             no site was killed" end),
        "bytes        \(.secagg.upload_bytes_per_site_round) up, \(.secagg.download_bytes_per_site_round) down, per site and round",
        "seconds      \(.seconds) in all; stages of the rounds: \(.stage_seconds | to_entries | map("\(.key) \(.value)") | join(", "))",
        "question     \(.answer.prompt)",
        "answer       \(.answer.text | if . == "" then "(empty)" else . end)   (adapter version \(.answer.adapter_version), \(.answer.adapter_sha256[0:16])...)",
        ""' "$work/report.json"
    echo "report       build/demo/report.json"
}
