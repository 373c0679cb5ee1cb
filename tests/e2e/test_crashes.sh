#!/usr/bin/env bash
# One site of five dies by SIGKILL at every crash point, one a round, and is started again as an init system would: every
# round completes without it, no step of its budget is used twice, and it ends with the adapter of all others.
. "$(dirname "$0")/lib.sh"

write_federation 5
sign_up
enrol_all
points=(masked-acknowledged masked-sending reserved trained shares-sent consistency-signed unmask-sent result)
rounds=$((${#points[@]} + 1)) # the last one is quiet
write_job demo $rounds

say "$rounds rounds; site-c dies in each but the last"
start_aggregator
for site in site-a site-b site-d site-e; do start_node $site; done
supervise site-c $(for i in "${!points[@]}"; do echo "${points[i]}:$((i + 1))"; done)
submit demo
wait_job demo 150
until_true 10 "site-c has the last version" has_event site-c ".event == \"adapter_swapped\" and .version == $rounds"
equal "site-c died at every point" "$(sed 's/:.*//' "$work/deaths-site-c")" "$(printf '%s\n' "${points[@]}")"
versions_agree demo

say "what each death did"
version() { events aggregator ".event == \"version_signed\" and .version == $1" | jq -c "$2"; }
round_of() { local i; for i in "${!points[@]}"; do [ "${points[i]}" != "$1" ] || echo $((i + 1)); done; }
equal "no round was skipped" "$(event_count aggregator '.event == "round_skipped"')" 0
equal "after its vector was acknowledged: it is in the sum of five" "$(version "$(round_of masked-acknowledged)" .survivors)" 5
equal "before its vector was complete: the sum is of four" "$(version "$(round_of masked-sending)" .survivors)" 4
equal "... and its masks were removed" "$(version "$(round_of masked-sending)" .dropouts_recovered)" 1
equal "after it sent its shares: the sum is of four" "$(version "$(round_of shares-sent)" .survivors)" 4
equal "... and its masks were removed" "$(version "$(round_of shares-sent)" .dropouts_recovered)" 1
for point in reserved trained; do
    equal "$point: never in the sum" "$(version "$(round_of $point)" .survivors)" 4
done
for point in consistency-signed unmask-sent result; do
    equal "$point: in the sum" "$(version "$(round_of $point)" .survivors)" 5
done
equal "the quiet round has all five" "$(version $rounds .survivors)" 5
equal "every version is co-signed by a quorum" "$(aggregator model list demo --format json | jq 'all(.cosigned)')" true
equal "site-c caught up after each round whose result it missed" \
    "$(events site-c '.event == "caught_up"' | jq -sc 'map(.version)')" "[1,2,3,4,5,6,7,8]"

say "the budget"
node site-c privacy report --format json >"$work/report.json"
equal "what was reserved before an upload is burnt, and counts" "$(jq .burnt "$work/report.json")" 3
equal "the others were released" "$(jq .released "$work/report.json")" $((rounds - 3))
equal "no step was done twice, none is missing" "$(jq .steps "$work/report.json")" $((2 * rounds))
ok "the budget held" jq -e '.epsilon_spent <= 8' "$work/report.json"
node site-a privacy report --format json >"$work/report-a.json"
equal "the quiet site spent the same" "$(jq .epsilon_spent "$work/report.json")" "$(jq .epsilon_spent "$work/report-a.json")"

say "a site that dies in the last round"
write_job short 1 "mode: record, epsilon: 0.5, delta: 0.00001"
sed -i 's/max_epsilon: 8/max_epsilon: 9/' "$work"/site-?.yaml
stop_gently "${sites[@]}"
for site in site-a site-b site-d site-e; do start_node $site; done
supervise site-c result:1
submit short
wait_job short 60
until_true 20 "gets the job's last version after its end" has_event site-c '.event == "caught_up" and .job == "short" and .version == 1'
versions_agree short
stop_gently "${sites[@]}" aggregator
