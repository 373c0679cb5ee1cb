#!/usr/bin/env bash
# Five sites, three rounds: the same signed versions everywhere, served by name; nothing of a record, a prompt or a key in
# any artefact or on the wire; a changed adapter file is not loaded and the one before goes on serving.
. "$(dirname "$0")/lib.sh"

write_federation 5
sign_up
enrol_all
write_job demo 3

# Site A's traffic goes through a relay that keeps every byte.
relay=$(free_port)
python3 "$(dirname "$0")/relay.py" "$relay" "$port" "$work/wire.bin" &
pid_of[relay]=$!
sed -i "s|tcp://127.0.0.1:$port|tcp://127.0.0.1:$relay|" "$work/site-a.yaml"

say "three rounds"
start_aggregator
start_nodes
submit demo
wait_job demo 100
equal "three versions, all co-signed" "$(aggregator model list demo --format json | jq -c 'map(.cosigned)')" "[true,true,true]"
for site in "${sites[@]}"; do until_true 10 "$site has the last version" has_event "$site" '.event == "adapter_swapped" and .version == 3'; done
versions_agree demo
equal "each of the three versions came from all five sites" \
    "$(events aggregator '.event == "version_signed"' | jq -sc 'map(.survivors)')" "[5,5,5]"
equal "the parameters moved in every round" "$(aggregator model list demo --format json | jq 'map(.adapter_sha256) | unique | length')" 3

say "the answer names the adapter"
question="$canary question 7531"
ask site-b "$question" >"$work/answer.json"
equal "the answer's version" "$(jq .consilium.adapter_version "$work/answer.json")" 3
equal "the answer's SHA-256 is the last signed one" "$(jq -r .consilium.adapter_sha256 "$work/answer.json")" "$(newest demo)"

say "the budget"
for site in "${sites[@]}"; do
    node "$site" privacy report --format json >"$work/report.json"
    ok "$site spent at most 8, and all that the job was planned to" jq -e \
        '.epsilon_spent <= 8 and .epsilon_spent > 7.9 and .steps == 6 and .released == 3 and .burnt == 0' "$work/report.json"
done

say "nothing private in what is left behind or was sent"
ok "the relay saw the uploads" test "$(stat -c %s "$work/wire.bin")" -gt 40000
artefacts() { # every file but the records, the answer, and each site's own key
    find "$work" -type f ! -name '*.jsonl' ! -name answer.json ! -name '*.key'
    find "$work" -name journal.jsonl
}
holds() { artefacts | xargs -d '\n' grep -laF -e "$1" >/dev/null; }
none_holds() { ! holds "$1" || fail "a file holds $2"; }
ok "the search finds what is there" holds 'e2e'
ok "no text of a record" none_holds "$canary" "text of a record"
ok "no prompt" none_holds 7531 "a prompt"
for key in "$work"/*/site.key "$work"/governance.key "$work"/aggregator/server.key; do
    ok "no key of $(basename "$(dirname "$key")") elsewhere" none_holds "$(sed -n 2p "$key")" "a private key"
done
ok "no loss in a log or journal" bash -c "! grep -liE 'loss|nll' $work/*.log $work/*/journal.jsonl"
equal "the spool is empty" "$(find "$work/aggregator/spool" -type f | wc -l)" 0

say "a changed adapter file"
file=$work/site-b/adapters/demo/000003.adapter
ok "the file is there" test -f "$file"
printf '\x5a' | dd of="$file" bs=1 seek=$(($(stat -c %s "$file") / 2)) conv=notrunc status=none
ask site-b "again" >"$work/answer.json"
equal "the running daemon goes on serving the version that it verified" "$(jq -r .consilium.adapter_sha256 "$work/answer.json")" "$(newest demo)"
equal "model list shows the damage" "$(held site-b demo)" damaged
refused 6 'signature does not fit' "it is not exported" node site-b model export demo 3 "$work/export"
stop_gently site-b
start_node site-b
until_true 20 "the daemon answers again" ask site-b "again"
ask site-b "again" >"$work/answer.json"
equal "after a restart the version before it is served" "$(jq .consilium.adapter_version "$work/answer.json")" 2
equal "with its own SHA-256" "$(jq -r .consilium.adapter_sha256 "$work/answer.json")" \
    "$(aggregator model list demo --format json | jq -r '.[1].adapter_sha256')"
ok "the journal says why" has_event site-b '.event == "adapter_refused" and .version == 3'

say "a second job goes on from nothing, with the damaged file and all"
write_job second 1 "mode: record, epsilon: 0.5, delta: 0.00001"
submit second
timeout 60 "$bin/consilium-aggregator" -c "$work/aggregator.yaml" job watch second >/dev/null 2>&1 && fail "the budget was spent: every site should refuse"
equal "every site refused the second job before training" "$(for site in "${sites[@]}"; do event_count "$site" '.event == "round_refused" and .job == "second" and .code == 5'; done | sort -u)" 1
for site in "${sites[@]}"; do
    equal "$site trained three times only" "$(event_count "$site" '.event == "trained"')" 3
done
stop_gently "${sites[@]}" aggregator
