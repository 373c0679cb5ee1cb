#!/usr/bin/env bash
# Nodes with an NVIDIA card, which is this computer's memory and threads (kernels/cuda/shim): one has room for everything,
# one for the weights alone, one for training but not for answering. They finish a job together, each where it can.
. "$(dirname "$0")/lib.sh"

cpu_only=$bin/consilium-node
write_federation 3
give_memory() { echo "device: {memory_limit_mb: $2, batch_tokens: 256}" >>"$work/$1.yaml"; } # SITE MB; small batches: no card is fast here
give_memory site-a 100
give_memory site-b 1
give_memory site-c 5
sign_up
enrol_all
write_job demo 1

say "preflight: where, and why not on the card"
preflight() { # SITE ROW [VARIABLE=VALUE]: the row's detail; nothing listens yet, so it ends with 3
    local site=$1 row=$2
    shift 2
    (export "${@:-LC_ALL=C}"; node "$site" preflight --format json 2>/dev/null || true) |
        jq -r ".[] | select(.check == \"$row\") | .detail"
}
matches() { grep -Eq -- "$1" <<<"$2" || { echo "'$2' does not hold '$1'" >&2; false; }; }
cpu=$("$cpu_only" -c "$work/site-a.yaml" preflight --format json 2>/dev/null | jq -r '.[] | select(.check == "model") | .detail') || true
ok "a build without CUDA names the CPU alone" matches '^(scalar|avx[a-z0-9-]*)$' "$cpu"
equal "the card" "$(preflight site-a model), $(preflight site-a answering)" "cuda:0 shim, cuda:0 shim"
equal "the weights fit" "$(preflight site-b model)" "cuda:0 shim"
ok "and answering does not" matches "^$cpu, not the card: .*do not fit the 1.0 MB" "$(preflight site-b answering)"
ok "a card that is too old" matches "^$cpu, not the card: .*too old" "$(preflight site-a model CONSILIUM_SHIM_CAPABILITY=75)"
ok "no card" matches "^$cpu, not the card: no CUDA device" "$(preflight site-a model CONSILIUM_SHIM_DEVICES=0)"
refused 7 'preflight' "cuda: what does not fit is a failure of preflight too" node site-b --set device.kind=cuda preflight
equal "its row" "$(jq -Rr 'capture("^answering +(?<result>[A-Za-z]+)").result' "$work/out" 2>/dev/null)" FAILED

say "commands: auto goes on on the CPU and warns, cuda ends with exit 7"
lora="layers=0-1;targets=q,v;rank=4;alpha=16;scaling=rank;mode=ffa;seed=$(printf '0a%.0s' $(seq 32))"
heard() { node site-b "$@" 2>"$work/err" || { cat "$work/err" >&2; false; }; }
each() { # WHAT COMMAND...
    local what=$1
    shift
    ok "$1 with auto" heard "$@"
    ok "and says why" grep -q "\"warn\".*$what on the CPU, not on the card: .*MB" "$work/err"
    refused 7 'do not fit the 1.0 MB' "$1 with cuda" node site-b --set device.kind=cuda "$@"
}
each evaluating eval --data "$work/site-b.jsonl" --base --records 3
each answering generate --base --max-tokens 3 "$canary 1"
each training train --local --lora "$lora" --out "$work/local" --dp none

say "a job"
start_aggregator
start_nodes
submit demo
wait_job demo 60
for site in "${sites[@]}"; do until_true 10 "$site has the version" has_event "$site" '.event == "adapter_swapped"'; done
versions_agree demo
answering() { events "$1" '.event == "serve_started"' | jq -r .kernels; }
training() { grep -o 'training on [^ ,]*' "$work/$1.log" | tail -n 1; }
equal "site-a does all of it on the card" "$(answering site-a), $(training site-a)" "cuda:0 shim, training on cuda:0"
equal "site-b nothing" "$(answering site-b), $(training site-b)" "$cpu, training on $cpu"
equal "site-c trains there" "$(answering site-c), $(training site-c)" "$cpu, training on cuda:0"
equal "nobody was left out" "$(events aggregator '.event == "version_signed"' | jq .survivors)" 3
for site in "${sites[@]}"; do ok "$site answers" test -n "$(ask $site "$canary 12" | jq -r '.choices[0].message.content')"; done
stop_gently "${sites[@]}" aggregator
