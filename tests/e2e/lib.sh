# Sourced by the end-to-end tests: federations of real processes on loopback, in a temporary folder that goes at the end.
# shellcheck shell=bash
#   CONSILIUM_TEST_BIN    folder of the programs;  CONSILIUM_TEST_MAKER  make_tiny_model
#   CONSILIUM_TEST_NODE   another consilium-node than that folder's
#   CONSILIUM_TEST_FORM=folder: the base model is a Hugging Face folder instead of a GGUF file
#   CONSILIUM_TEST_KEEP=1 leaves the temporary folder behind
set -euo pipefail

bin=${CONSILIUM_TEST_BIN:?the folder of the programs}
node_program=${CONSILIUM_TEST_NODE:-$bin/consilium-node}
for tool in jq curl; do
    command -v $tool >/dev/null || { echo "skipped: $tool is missing" >&2; exit 77; }
done
work=$(mktemp -d "${TMPDIR:-/tmp}/consilium-e2e-XXXXXX")
declare -A pid_of=() # aggregator or site -> process
checks=0

cleanup() {
    local status=$? name
    for name in "${!pid_of[@]}"; do kill "${pid_of[$name]}" 2>/dev/null || true; done
    for _ in $(seq 30); do
        [ -n "$(jobs -pr)" ] || break
        sleep 0.1
    done
    for name in "${!pid_of[@]}"; do kill -9 "${pid_of[$name]}" 2>/dev/null || true; done
    wait 2>/dev/null || true
    if [ $status -ne 0 ] && [ $status -ne 77 ]; then
        for name in "$work"/*.log; do
            [ -s "$name" ] && { echo "--- $(basename "$name")"; tail -n 8 "$name"; } >&2
        done
    fi
    if [ -z "${CONSILIUM_TEST_KEEP:-}" ]; then rm -rf "$work"; else echo "left behind: $work" >&2; fi
    [ $status -ne 0 ] || echo "$checks checks passed"
}
trap cleanup EXIT

say() { echo "== $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
# ok WHAT COMMAND...: the command must succeed
ok() {
    local what=$1
    shift
    "$@" >/dev/null || fail "$what"
    checks=$((checks + 1))
    echo "ok   $what"
}
equal() { # WHAT GOT EXPECTED
    [ "$2" = "$3" ] || fail "$1: got '$2', expected '$3'"
    checks=$((checks + 1))
    echo "ok   $1"
}
# refused CODE TEXT WHAT COMMAND...: the command must end with this exit code and say TEXT (a regular expression) on stderr
refused() {
    local code=$1 text=$2 what=$3 got=0
    shift 3
    "$@" >"$work/out" 2>"$work/err" </dev/null || got=$?
    [ "$got" = "$code" ] || fail "$what: exit $got instead of $code: $(cat "$work/err")"
    grep -Eq -- "$text" "$work/err" || fail "$what: the message does not hold '$text': $(cat "$work/err")"
    checks=$((checks + 1))
    echo "ok   $what (exit $code)"
}
# until_true SECONDS WHAT COMMAND...: polls
until_true() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "$what: not within the time"
        sleep 0.1
    done
    checks=$((checks + 1))
    echo "ok   $what"
}

free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

aggregator() { timeout 60 "$bin/consilium-aggregator" -c "$work/aggregator.yaml" "$@"; }
node() { local site=$1; shift; timeout 60 "$node_program" -c "$work/$site.yaml" "$@"; }

# $model: what model.path names, relative to the configurations
case ${CONSILIUM_TEST_FORM:-gguf} in
    gguf) model=tiny.gguf ;;
    folder) model=tiny ;;
    *) echo "CONSILIUM_TEST_FORM is gguf or folder" >&2; exit 1 ;;
esac
make_model() { # NAME: a GGUF file if it is named like one, else a folder; both are the same weights
    [ -e "$work/$1" ] && return
    if [[ $1 == *.gguf ]]; then "${CONSILIUM_TEST_MAKER:?}" "$work/$1"; else "${CONSILIUM_TEST_MAKER:?}" --folder "$work/$1"; fi
}

# Forty records a site; every text holds the canary, so that none of it may turn up anywhere else.
canary=zebrafinch
write_records() { # FILE
    local i labels=(north south east west)
    for i in $(seq 40); do
        printf '{"messages": [{"role": "user", "content": "%s %d"}, {"role": "assistant", "content": "%s"}]}\n' \
            "$canary" "$i" "${labels[i % 4]}"
    done >"$1"
}

write_node_yaml() { # SITE [EXTRA POLICY KEYS]
    cat >"$work/$1.yaml" <<YAML
version: 1
site: $1
state: $1
aggregator: {url: "tcp://127.0.0.1:$port", federation: e2e}
model: {path: $model}
data: {path: $1.jsonl}
policy: {consent: within-policy, max_epsilon: 8, delta: 0.00001${2:+, $2}}
serve: {listen: "unix:$work/$1.sock"}
YAML
}

# write_federation N: model, records and configurations of N sites; nothing runs yet
write_federation() {
    local i
    sites=()
    for ((i = 0; i < $1; i++)); do sites+=("site-$(printf %b "\\x$(printf %x $((97 + i)))")"); done
    port=$(free_port)
    make_model $model
    cat >"$work/aggregator.yaml" <<YAML
version: 1
federation: e2e
state: aggregator
listen: {url: "tcp://127.0.0.1:$port", names: [127.0.0.1]}
round: {gather: 3s, liveness: 30s, grace: 1s}
limits: {chunk: 4096}
YAML
    for site in "${sites[@]}"; do
        write_node_yaml "$site"
        write_records "$work/$site.jsonl"
    done
}

enrol_site() { # SITE [ARGUMENTS THAT REPLACE THE RIGHT ONES: last one counts]
    local site=$1
    shift
    node "$site" enroll --certificate "$work/$site.crt" --ca "$work/aggregator/ca.crt" --roster "$work/roster.bin" \
        --governance "$work/governance.key.pub" --ca-fingerprint "$(jq -r .ca_fingerprint "$work/init.json")" \
        --governance-fingerprint "$(jq -r .fingerprint "$work/governance.json")" "$@"
}

# From nothing to enrolled sites, by the programs' own commands.
sign_up() {
    local site
    "$bin/consilium-governance" key "$work/governance.key" --format json >"$work/governance.json"
    "$bin/consilium-governance" key "$work/author.key" >/dev/null
    aggregator init --format json >"$work/init.json"
    for site in "${sites[@]}"; do
        node "$site" init >/dev/null
        aggregator ca approve "$work/$site/site.csr" --out "$work/$site.crt" --yes >/dev/null
    done
    new_roster
}

new_roster() {
    aggregator roster draft --authors "$work/author.key.pub" --out "$work/roster.json" >/dev/null
    "$bin/consilium-governance" sign "$work/roster.json" --key "$work/governance.key" --out "$work/roster.bin" --yes \
        >/dev/null 2>&1
    aggregator roster install "$work/roster.bin" --governance "$work/governance.key.pub" >/dev/null
}

enrol_all() { local site; for site in "${sites[@]}"; do enrol_site "$site" >/dev/null; done; }

# write_job NAME ROUNDS [DP LINE]: every linear of both layers, so that the vector takes several chunks. lora_mode: ffa
write_job() {
    [ -f "$work/model.json" ] || "$node_program" model describe "$work/$model" >"$work/model.json"
    cat >"$work/$1.yaml" <<YAML
version: 1
job: $1
model: {card: model.json}
lora: {targets: [q, k, v, o, gate, up, down], rank: 4, mode: ${lora_mode:-ffa}}
rounds: {count: $2, min_sites: 3, train_deadline: 40s, stage_deadline: ${stage_deadline:-15s}}
train: {steps: 2, batch: 8, learning_rate: 0.5, optimizer: sgd, max_tokens: 128, system: none}
aggregation: {optimizer: fedavgm, momentum: 0.5, grid_bits: 16}
dp: {${3:-mode: record, epsilon: 8, delta: 0.00001}}
YAML
}
submit() { aggregator job submit "$work/$1.yaml" --author-key "$work/author.key" >/dev/null; }

start_aggregator() {
    "$bin/consilium-aggregator" -c "$work/aggregator.yaml" run 2>>"$work/aggregator.log" &
    pid_of[aggregator]=$!
}
start_node() { # SITE [CRASH POINT]
    CONSILIUM_CRASH_AT=${2:-} "$node_program" -c "$work/$1.yaml" run 2>>"$work/$1.log" &
    pid_of[$1]=$!
}
start_nodes() { local site; for site in "${sites[@]}"; do start_node "$site"; done; }
# supervise SITE POINT...: starts the site again whenever it dies, each time with the next crash point, as an init system
# would; "deaths-SITE" lists them. pid_of[SITE] is the supervisor.
supervise() {
    local site=$1
    shift
    (
        pid=''
        trap '[ -z "$pid" ] || kill "$pid"; wait; exit 0' TERM
        while :; do
            CONSILIUM_CRASH_AT=${1:-} "$node_program" -c "$work/$site.yaml" run 2>>"$work/$site.log" &
            pid=$!
            wait "$pid" && break
            echo "${1:-died by itself}" >>"$work/deaths-$site"
            shift || true
        done
    ) 2>/dev/null &
    pid_of[$site]=$!
}
kill_hard() { # NAME
    kill -9 "${pid_of[$1]}"
    wait "${pid_of[$1]}" 2>/dev/null || true
    unset "pid_of[$1]"
}
stop_gently() { # NAME...: SIGTERM must end a daemon with exit code 0
    local name
    for name in "$@"; do
        kill "${pid_of[$name]}"
        wait "${pid_of[$name]}" || fail "$name ended with exit code $? at SIGTERM"
        unset "pid_of[$name]"
    done
}

# events NAME FILTER: the journal's events that satisfy a jq filter, one JSON a line
events() { jq -c "select($2)" "$work/$1/journal.jsonl" 2>/dev/null || true; }
event_count() { events "$1" "$2" | wc -l; }
has_event() { [ "$(event_count "$1" "$2")" -gt 0 ]; }

# wait_job NAME SECONDS: `job watch` must end well
wait_job() {
    timeout "$2" "$bin/consilium-aggregator" -c "$work/aggregator.yaml" job watch "$1" >/dev/null 2>"$work/watch.txt" ||
        fail "job $1 did not end well: $(tail -n 3 "$work/watch.txt")"
    checks=$((checks + 1))
    echo "ok   job $1 is done"
}
newest() { aggregator model list "$1" --format json | jq -r '.[-1].adapter_sha256'; }
held() { node "$1" model list --format json | jq -r "[.[] | select(.job == \"$2\")][-1].adapter_sha256"; }

# Every version of the job that a site holds is the aggregator's of this number.
versions_agree() { # JOB
    local site
    aggregator model list "$1" --format json | jq -c '[.[] | {version, adapter_sha256}]' >"$work/versions.json"
    for site in "${sites[@]}"; do
        node "$site" model list --format json | jq -c "[.[] | select(.job == \"$1\") | {version, adapter_sha256}]" |
            jq -e --slurpfile all "$work/versions.json" 'length > 0 and (. - $all[0]) == []' >/dev/null ||
            fail "$site holds a version of $1 that the aggregator does not know"
        [ "$(held "$site" "$1")" = "$(newest "$1")" ] || fail "$site does not hold the newest version of $1"
    done
    checks=$((checks + 1))
    echo "ok   versions of $1 are equal at the aggregator and all sites"
}

ask() { # SITE TEXT -> the whole answer
    jq -n --arg text "$2" '{messages: [{role: "user", content: $text}], max_tokens: 8, temperature: 0}' |
        curl -sS --fail-with-body --max-time 30 --unix-socket "$work/$1.sock" -H 'Content-Type: application/json' \
            --data-binary @- http://localhost/v1/chat/completions
}
