#!/usr/bin/env bash
# The site's policy is final: jobs that ask for less protection, other people's consent, closed hours, a spent budget, a
# stranger's certificate.
. "$(dirname "$0")/lib.sh"

write_federation 3
write_node_yaml site-b 'allow_without_dp: true'
sed -i 's/consent: within-policy/consent: ask/' "$work/site-c.yaml"
sign_up
enrol_all
start_aggregator
start_nodes
refuses() { has_event "$1" ".event == \"round_refused\" and .job == \"$2\" and .code == 5 and (.reason | test(\"$3\"))"; }
# Submits a job that SITE keeps out of; it stands still until the operator gives up. DECLINE: how the site declines it.
stands_still() { # JOB SITE REASON
    submit "$1"
    until_true 20 "$2 keeps out of $1: $3" refuses "$2" "$1" "$3"
}
give_up() {
    aggregator job abort "$1" --yes >/dev/null
    until_true 10 "job $1 is given up" has_event aggregator ".event == \"job_ended\" and .job == \"$1\" and .state == \"aborted\""
    ok "it opened one round only: nobody's budget is spent on tries" test "$(event_count aggregator ".event == \"round_opened\" and .job == \"$1\"")" -le 1
}

say "jobs that ask for less protection than the policy"
write_job nodp 2 "mode: none"
stands_still nodp site-a 'allow_without_dp is false'
give_up nodp
ok "site-b's policy allows it" test "$(event_count site-b '.event == "round_refused" and .job == "nodp"')" = 0
write_job loose 2 "mode: record, epsilon: 9, delta: 0.00001"
stands_still loose site-a 'max_epsilon is 8'
give_up loose
write_job careless 2 "mode: record, epsilon: 1, delta: 0.001"
stands_still careless site-a 'delta'
give_up careless
for site in "${sites[@]}"; do
    [ $site = site-b ] || equal "$site has read no record" "$(event_count $site '.event == "trained"')" 0
done
refused 5 'allow_without_dp' "a person cannot approve it either" node site-c consent approve nodp
refused 5 'max_epsilon' "nor the large epsilon" node site-c consent approve loose
equal "it stays as it was" "$(node site-c consent list --format json | jq -r '.[] | select(.job == "nodp").consent')" pending

say "consent"
write_job asked 3 "mode: record, epsilon: 3, delta: 0.00001"
stands_still asked site-c 'waits for consent'
equal "consent show tells what is asked" "$(node site-c consent show asked --format json | jq -c '[.job, .epsilon == 3, .consent]')" '["asked",true,"pending"]'
refused 1 'no job' "a job that was never offered cannot be approved" node site-c consent approve ghost
sleep 1
equal "the job waits for the site's people" "$(aggregator job list --format json | jq -r '.[] | select(.job == "asked") | "\(.state) \(.rounds_opened)"')" "running 1"
plan=$(node site-c consent show asked --format json | jq -r .plan)
node site-c consent show asked --format json >"$work/show.json"
ok "it shows how the job trains and whom it assumes" jq -e '.learning_rate == 0.5 and .max_tokens == 128 and .system_message == "none" and
    .colluders_assumed == 1 and .honest_in_every_sum == 2 and (.valid_until | test("^20..-..-..T"))' "$work/show.json"
refused 2 'consent approve asked --plan' "without a terminal the plan must be named" node site-c consent approve asked
refused 2 'consent approve asked --plan' "--yes is not enough: nobody saw a plan" node site-c consent approve asked --yes
refused 2 '64 hexadecimal' "not a hash" node site-c consent approve asked --plan beef
refused 5 'not the one given' "another plan's hash" node site-c consent approve asked --plan "$(printf 'ab%.0s' $(seq 32))"
equal "it is still pending" "$(node site-c consent list --format json | jq -r '.[] | select(.job == "asked").consent')" pending
node site-c consent approve asked --plan "$plan" >/dev/null
wait_job asked 60 # the running daemon notices within its next poll of 25 s at most
equal "approved, it took part in the two rounds that were left" "$(event_count site-c '.event == "trained" and .job == "asked"')" 2
write_job again 2 "mode: record, epsilon: 0.5, delta: 0.00001"
stands_still again site-c 'waits for consent'
node site-c consent deny again >/dev/null
equal "denied" "$(node site-c consent list --format json | jq -r '.[] | select(.job == "again").consent')" denied
give_up again

say "budget"
spent() { node site-b privacy report --format json | jq .epsilon_spent; }
spent_before=$(spent)
trained=$(event_count site-b '.event == "trained"')
# Reading with a larger budget must not raise the one that the running daemon enforces.
CONSILIUM_POLICY_MAX_EPSILON=50 node site-b privacy report --format json >"$work/report.json"
equal "a report shows the budget in force" "$(jq '.epsilon_budget == 8' "$work/report.json")" true
write_job greedy 2 "mode: record, epsilon: 8, delta: 0.00001"
stands_still greedy site-b 'budget|epsilon'
refused 5 'epsilon|budget' "consent approve counts the whole job" node site-c consent approve greedy
give_up greedy
stop_gently site-b
start_node site-b
until_true 20 "site-b is back" test -n "$(sleep 1; events site-b '.event == "connected"' | sed -n 2p)"
write_job greedy2 2 "mode: record, epsilon: 8, delta: 0.00001"
stands_still greedy2 site-b 'budget|epsilon'
give_up greedy2
equal "refused before any training" "$(event_count site-b '.event == "trained"')" "$trained"
equal "nothing more was spent" "$(spent)" "$spent_before"
lora="layers=0-1;targets=q,v;rank=4;alpha=16;scaling=rank;mode=ffa;seed=$(printf '00%.0s' $(seq 32))"
refused 7 'another consilium-node runs' "a second daemon with the same state" node site-b run
refused 7 'another consilium-node runs' "train --local beside the daemon" node site-b train --local --lora "$lora" --out "$work/local"
refused 7 'another consilium-aggregator runs' "a second aggregator with the same state" aggregator run
stop_gently site-b
mv "$work/site-b/ledger.sqlite" "$work/ledger.aside"
refused 6 'put back the newest copy' "a lost ledger is not replaced by an empty one" node site-b train --local --lora "$lora" --epsilon 1 --out "$work/local"
refused 6 'put back the newest copy' "nor does a report take it for unspent" node site-b privacy report
ok "none was made" test ! -e "$work/site-b/ledger.sqlite"
mv "$work/ledger.aside" "$work/site-b/ledger.sqlite"
equal "put back, it is what it was" "$(spent)" "$spent_before"
refused 5 'budget|epsilon' "train --local is refused too" node site-b train --local --lora "$lora" --epsilon 8 --out "$work/local"
ok "and leaves nothing" test ! -e "$work/local"
write_node_yaml site-d
write_records "$work/site-d.jsonl"
node site-d train --local --lora "$lora" --epsilon 4 --rounds 2 --out "$work/local" --format json >/dev/null
ok "on a fresh ledger it trains" test -s "$work/local/adapter_model.safetensors"
refused 5 'budget|epsilon' "and again is too much" node site-d train --local --lora "$lora" --epsilon 8 --rounds 2 --out "$work/local2"

say "what the aggregator hears"
reasons() { events aggregator '.event == "site_declined"' | jq -r .reason | sort -u; }
ok "classes" test "$(reasons | grep -Ec "^(the site's policy|no consent of the site|the site's privacy budget)$")" = 3
equal "and nothing else: no figure of a site" "$(reasons | grep -Evc "^(the site's policy|no consent of the site|the site's privacy budget)$" || true)" 0

say "a site that asks for more honest sites than the job assumes"
write_node_yaml site-b 'min_honest: 3'
start_node site-b
write_job trusting 2 "mode: record, epsilon: 1, delta: 0.00001"
stands_still trusting site-b 'this site asks for at least'
give_up trusting
equal "its budget is whole" "$(spent)" "$spent_before"
equal "and it read nothing" "$(event_count site-b '.event == "trained" and .job == "trusting"')" 0
stop_gently site-b

say "without DP after DP, restarted"
stop_gently site-a site-c
for site in "${sites[@]}"; do write_node_yaml $site 'allow_without_dp: true'; done
start_nodes # peers have seen the ledgers' heads
write_job plain 1 "mode: none"
submit plain
wait_job plain 60
stop_gently site-b

say "hours"
from=$(date -d '+2 hours' +%H:%M) to=$(date -d '+3 hours' +%H:%M)
sed -i "s|^policy: {|policy: {hours: [\"$from-$to\"], |" "$work/site-b.yaml"
start_node site-b
write_job night 2 "mode: record, epsilon: 0.1, delta: 0.00001"
stands_still night site-b "policy.hours allows training in $from-$to"
give_up night

say "who belongs"
# Another federation's CA makes a certificate for a site of the same name; and a site of our CA that is not in the roster.
sed -e 's/^state: .*/state: stranger/' "$work/aggregator.yaml" >"$work/stranger.yaml"
"$bin/consilium-aggregator" -c "$work/stranger.yaml" init >/dev/null
"$bin/consilium-aggregator" -c "$work/stranger.yaml" ca approve "$work/site-a/site.csr" --out "$work/forged.crt" --yes >/dev/null
stop_gently site-a
mkdir -p "$work/intruder"
cp "$work"/site-a/{site.key,ca.crt,governance.pub,roster.bin} "$work/intruder"
cp "$work/forged.crt" "$work/intruder/site.crt"
sed 's/^state: .*/state: intruder/' "$work/site-a.yaml" >"$work/intruder.yaml"
refused 6 'not one of this CA' "a stranger's certificate is noticed at home" node intruder run
cp "$work/stranger/ca.crt" "$work/intruder/ca.crt"
refused 6 'does not list' "also with the stranger's CA: the roster does not list it" node intruder run
init_site() { node "$1" init >/dev/null && aggregator ca approve "$work/$1/site.csr" --out "$work/$1.crt" --yes >/dev/null; }
rm -rf "$work/site-d"
init_site site-d
refused 6 'does not list' "a certified site that the roster does not list cannot enrol" enrol_site site-d
ok "nothing was stored" test ! -e "$work/site-d/roster.bin" -a ! -e "$work/site-d/ca.crt"
stop_gently site-c aggregator
