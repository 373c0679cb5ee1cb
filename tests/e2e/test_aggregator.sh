#!/usr/bin/env bash
# The aggregator absent at the start (CONSILIUM_TEST_ABSENT_S seconds, 8 unless told); killed in the middle of a round
# and started again; too few co-signatures because two sites died with the result in hand: the job goes on and versions
# agree everywhere.
. "$(dirname "$0")/lib.sh"

write_federation 5
sign_up
enrol_all

say "sites wait for an aggregator that is not there yet"
start_nodes
sleep "${CONSILIUM_TEST_ABSENT_S:-8}"
for site in "${sites[@]}"; do ok "$site lives" kill -0 "${pid_of[$site]}"; done
ok "the log says what it waits for" grep -q 'trying again' "$work/site-a.log"
start_aggregator
for site in "${sites[@]}"; do until_true 15 "$site connects" has_event $site '.event == "connected"'; done

say "the aggregator is killed in a round"
write_job demo 5 "mode: record, epsilon: 2, delta: 0.00001"
submit demo
until_true 30 "a first version" has_event aggregator '.event == "version_signed"'
kill -STOP "${pid_of[site-a]}" # now a round stands still, waiting for this site
# The journal's last word is an opening, and nothing follows for two seconds.
stands_still() {
    local before
    before=$(wc -l <"$work/aggregator/journal.jsonl")
    tail -n 1 "$work/aggregator/journal.jsonl" | jq -e '.event == "round_opened"' || return 1
    sleep 2
    [ "$(wc -l <"$work/aggregator/journal.jsonl")" = "$before" ]
}
until_true 40 "a round stands still" stands_still
interrupted=$(events aggregator '.event == "round_opened"' | tail -n 1 | jq .round)
kill_hard aggregator
kill -CONT "${pid_of[site-a]}"
start_aggregator
wait_job demo 100
echo "   round $interrupted was interrupted"
ok "the interrupted round gave no version" test \
    "$(aggregator model list demo --format json | jq "any(.version == $interrupted)")" = false
equal "its number is not used again" "$(event_count aggregator ".event == \"round_opened\" and .round == $interrupted")" 1
equal "the last round gave a version" "$(aggregator model list demo --format json | jq '.[-1].version')" 5
for site in "${sites[@]}"; do until_true 10 "$site has the last version" has_event $site '.event == "adapter_swapped" and .version == 5'; done
versions_agree demo
equal "the spool keeps nothing of the round that died" "$(find "$work/aggregator/spool" -type f | wc -l)" 0
equal "the steps of the interrupted round are burnt or were never reserved, at each site" \
    "$(for site in "${sites[@]}"; do node $site privacy report --format json | jq '.released + .burnt <= 5 and .unfinished == 0'; done | sort -u)" true

say "two of five sites die with the result in hand: no quorum of co-signatures, the version is taken back"
stop_gently site-c site-d
supervise site-c result:1 result:3
supervise site-d result:1 result:3
stage_deadline=5s write_job second 4 "mode: record, epsilon: 2, delta: 0.00001"
submit second
wait_job second 100
equal "versions 1 and 3 were withdrawn" "$(events aggregator '.event == "version_withdrawn"' | jq -sc 'map([.version, .newest])')" "[[1,0],[3,2]]"
equal "versions 2 and 4 stay, co-signed" "$(aggregator model list second --format json | jq -c 'map([.version, .cosigned])')" "[[2,true],[4,true]]"
for site in "${sites[@]}"; do until_true 10 "$site has the last version" has_event $site '.event == "adapter_swapped" and .job == "second" and .version == 4'; done
versions_agree second
ok "a site that held a withdrawn version let it go" test ! -e "$work/site-a/adapters/second/000003.adapter"

say "the same in a job's last round: nobody goes on serving what was taken back"
stop_gently site-c site-d
supervise site-c result:2
supervise site-d result:2
stage_deadline=5s write_job third 2 "mode: record, epsilon: 2, delta: 0.00001"
submit third
wait_job third 100
equal "version 2 was withdrawn" "$(events aggregator '.event == "version_withdrawn" and .job == "third"' | jq -sc 'map([.version, .newest])')" "[[2,1]]"
gone() { [ ! -e "$work/$1/adapters/third/000002.adapter" ]; }
for site in "${sites[@]}"; do until_true 20 "$site let it go" gone $site; done
versions_agree third
equal "site-a answers with version 1" "$(ask site-a hello | jq .consilium.adapter_version)" 1
stop_gently "${sites[@]}" aggregator
