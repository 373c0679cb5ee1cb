#!/usr/bin/env bash
# Bad input: each case has its exit code and a message that says what, where and how to mend it.
. "$(dirname "$0")/lib.sh"

write_federation 3
sign_up

say "configuration: exit 2, file and line, the nearest key"
bad_node() { # CODE TEXT WHAT SED-EXPRESSION: a changed copy of site-a's configuration
    sed "$4" "$work/site-a.yaml" >"$work/bad.yaml"
    refused "$1" "$2" "$3" node bad privacy report
}
bad_node 2 'bad.yaml:7: .*max_epsilom.*policy.max_epsilon' "a typo names the nearest key" 's/max_epsilon/max_epsilom/'
bad_node 2 'bad.yaml:5: .*modle' "a typo in a section" 's/^model:/modle:/'
bad_node 2 'bad.yaml:7: .*max_epsilon' "a wrong type" 's/max_epsilon: 8/max_epsilon: eight/'
bad_node 2 'bad.yaml:7: .*max_epsilon' "out of range" 's/max_epsilon: 8/max_epsilon: 1000/'
bad_node 2 'bad.yaml:7: .*max_epsilon' "nan" 's/max_epsilon: 8/max_epsilon: .nan/'
bad_node 2 'bad.yaml:7: .*max_epsilon' "infinity" 's/max_epsilon: 8/max_epsilon: .inf/'
bad_node 2 'bad.yaml:7: .*consent' "an unknown choice" 's/within-policy/always/'
bad_node 2 'site' "a missing key" '/^site:/d'
bad_node 2 'version' "another version" 's/^version: 1/version: 2/'
bad_node 2 'bad.yaml:[0-9]*' "not YAML" 's/^policy: {/policy: {{/'
refused 2 'no-such.yaml' "no such file" "$bin/consilium-node" -c "$work/no-such.yaml" privacy report
refused 2 'policy.max_epsilon|CONSILIUM_POLICY_MAX_EPSILON' "a bad value in the environment" \
    env CONSILIUM_POLICY_MAX_EPSILON=nan "$bin/consilium-node" -c "$work/site-a.yaml" privacy report
refused 2 'enrol|unknown' "an unknown command" "$bin/consilium-node" enrol
sed 's/^listen: /lisen: /' "$work/aggregator.yaml" >"$work/bad-aggregator.yaml"
refused 2 'bad-aggregator.yaml:4: .*lisen' "the aggregator's configuration" "$bin/consilium-aggregator" -c "$work/bad-aggregator.yaml" run
write_job job 2
bad_job() { # TEXT WHAT SED-EXPRESSION
    sed "$3" "$work/job.yaml" >"$work/bad-job.yaml"
    refused 2 "$1" "$2" "$bin/consilium-aggregator" -c "$work/aggregator.yaml" job validate "$work/bad-job.yaml"
}
ok "the job is good" aggregator job validate "$work/job.yaml"
bad_job 'bad-job.yaml:6: .*learning_rat' "a job's typo" 's/learning_rate: 0.5/learning_rat: 0.5/'
bad_job 'bad-job.yaml:4: .*targets' "a job's unknown target" 's/\[q, k/[q, w/'
bad_job 'bad-job.yaml:4: .*targets' "a target named twice" 's/\[q, k/[q, q/'
bad_job 'bad-job.yaml:4: .*layer' "a layer that the model does not have" 's/rank: 4/rank: 4, layer_first: 5/'
bad_job 'bad-job.yaml:8: .*epsilon' "a job's epsilon out of range" 's/epsilon: 8/epsilon: -1/'
echo '{"sha256": "00"}' >"$work/card.json"
bad_job 'model card' "not a model card" 's/model.json/card.json/'

say "devices: a card that must be there, and is not, is exit 2 with the reason; auto goes on without"
on_device() { # KIND: site-a's configuration with this device
    printf 'device: {kind: %s}\n' "$1" | cat "$work/site-a.yaml" - >"$work/bad.yaml"
}
on_device quantum
refused 2 'device.kind.*quantum.*cuda:N' "an unknown device" node bad eval --data "$work/site-a.jsonl" --base
on_device cuda:99
refused 2 'device.kind.*(without CUDA|no NVIDIA driver|no CUDA device)' "a card that is not there" node bad eval --data "$work/site-a.jsonl" --base

say "enrolment: exit 6 and nothing stored"
other=$(printf 'ab%.0s' $(seq 32))
nothing_stored() { [ "$(find "$work/site-a" -type f | sort | xargs -n1 basename | tr '\n' ' ')" = "site.csr site.key " ]; }
refused 6 'fingerprint is .*Nothing was stored' "a wrong CA fingerprint" enrol_site site-a --ca-fingerprint "$other"
ok "nothing is stored" nothing_stored
refused 6 'fingerprint is .*Nothing was stored' "a wrong governance fingerprint" enrol_site site-a --governance-fingerprint "$other"
refused 2 '64 hexadecimal' "a fingerprint that is none" enrol_site site-a --ca-fingerprint "beef"
refused 6 "the certificate is for 'site-b'" "another site's certificate" enrol_site site-a --certificate "$work/site-b.crt"
sed 's/^state: .*/state: stranger/' "$work/aggregator.yaml" >"$work/stranger.yaml"
"$bin/consilium-aggregator" -c "$work/stranger.yaml" init >/dev/null
"$bin/consilium-aggregator" -c "$work/stranger.yaml" ca approve "$work/site-a/site.csr" --out "$work/forged.crt" --yes >/dev/null
refused 6 'not one of this CA' "a stranger's certificate" enrol_site site-a --certificate "$work/forged.crt"
cp "$work/roster.bin" "$work/changed.bin"
printf '\xff' | dd of="$work/changed.bin" bs=1 seek=60 conv=notrunc status=none
refused 6 'roster' "a changed roster" enrol_site site-a --roster "$work/changed.bin"
head -c 100 "$work/roster.bin" >"$work/short.bin"
refused 6 'roster' "a truncated roster" enrol_site site-a --roster "$work/short.bin"
ok "still nothing is stored" nothing_stored
refused 2 'enroll' "run says what is missing" node site-a run
enrol_all
refused 6 'governance' "a roster by another governance key is not installed" bash -c "
    '$bin/consilium-governance' key '$work/other.key' >/dev/null &&
    '$bin/consilium-governance' sign '$work/roster.json' --key '$work/other.key' --out '$work/other.bin' --yes >/dev/null 2>&1 &&
    '$bin/consilium-aggregator' -c '$work/aggregator.yaml' roster install '$work/other.bin' --governance '$work/other.key.pub'"

say "base models"
bad_model() { # CODE TEXT WHAT FILE
    sed "s|tiny.gguf|$4|" "$work/site-a.yaml" >"$work/bad.yaml"
    refused "$1" "$2" "$3" node bad generate --base hello
}
size=$(stat -c %s "$work/tiny.gguf")
head -c $((size / 2)) "$work/tiny.gguf" >"$work/half.gguf"
bad_model 6 'half.gguf' "truncated" half.gguf
head -c 11 "$work/tiny.gguf" >"$work/head.gguf"
bad_model 6 'head.gguf' "truncated in its header" head.gguf
{ head -c $((size - 4096)) "$work/tiny.gguf" && for _ in $(seq 1024); do printf '\x00\x00\xc0\x7f'; done; } >"$work/nan.gguf"
bad_model 6 'nan.gguf.*(NaN|nan|finite)' "NaN in a tensor" nan.gguf
{ head -c 8 "$work/tiny.gguf" && printf '\xff\xff\xff\xff\xff\xff\xff\x7f' && tail -c +17 "$work/tiny.gguf"; } >"$work/many.gguf"
bad_model 6 'many.gguf' "a tensor count beyond all measure" many.gguf
echo hello >"$work/text.gguf"
bad_model 6 'text.gguf' "no GGUF at all" text.gguf
bad_model 2 'bad.yaml:5: .*missing.gguf' "no file" missing.gguf
make_model good
spoiled() { rm -rf "$work/spoiled" && cp -r "$work/good" "$work/spoiled"; } # a copy of the same model as a folder
shard=model-00002-of-00002.safetensors
spoiled && truncate -s -4096 "$work/spoiled/$shard"
bad_model 6 "$shard" "a truncated shard" spoiled
spoiled && rm "$work/spoiled/$shard"
bad_model 1 "$shard: cannot open" "a shard that is not there" spoiled
spoiled && sed -i 's/"hidden_size": 64/"hidden_size": 63/' "$work/spoiled/config.json"
bad_model 6 'config.json: .*(hidden_size|num_attention_heads)' "sizes that do not fit" spoiled
spoiled && rm "$work/spoiled/tokenizer.json"
bad_model 1 'tokenizer.json is missing' "a folder without its tokenizer" spoiled
spoiled && rm "$work/spoiled/config.json"
bad_model 1 'config.json: cannot open' "a folder of something else" spoiled

say "records: counts are reported, contents are not"
{
    printf '{"messages": [{"role": "user", "content": "%s 1"}, {"role": "assistant", "content": "north"}]}\n' $canary
    printf '{"messages": [{"role": "user", "content": "%s \xff\xfe"}, {"role": "assistant", "content": "north"}]}\n' $canary
    printf '{"messages": [{"role": "user", "content": "%s 3"}]}\n' $canary
    printf '{"text": "%s 4"}\n' $canary
    printf '%s 5\n' $canary
} >"$work/bad.jsonl"
sed 's|site-a.jsonl|bad.jsonl|' "$work/site-a.yaml" >"$work/bad.yaml"
node bad eval --data "$work/bad.jsonl" --base --format json >"$work/out" 2>"$work/err"
equal "the good record is used" "$(jq .records "$work/out")" 1
ok "the faulty lines are counted" grep -Eq '[24] ' "$work/err"
ok "no content is printed" bash -c "! grep -q $canary $work/err $work/out"
: >"$work/empty.jsonl"
refused 6 'empty.jsonl' "an empty file" node bad eval --data "$work/empty.jsonl" --base
tail -n 2 "$work/bad.jsonl" >"$work/none.jsonl"
refused 6 'none.jsonl' "no usable record" node bad eval --data "$work/none.jsonl" --base
ok "no content is printed" bash -c "! grep -q $canary $work/err"

say "ports and sockets in use"
start_aggregator
until_true 10 "the aggregator listens" has_event aggregator '.event == "started"'
sed 's/^state: .*/state: second/' "$work/aggregator.yaml" >"$work/second.yaml"
cp -r "$work/aggregator" "$work/second"
refused 3 "$port" "the aggregator's port is taken" timeout 20 "$bin/consilium-aggregator" -c "$work/second.yaml" run
start_node site-a
until_true 10 "site-a serves" curl -sf --unix-socket "$work/site-a.sock" http://localhost/healthz
sed "s|site-b.sock|site-a.sock|" "$work/site-b.yaml" >"$work/bad.yaml"
refused 3 'site-a.sock' "another daemon's socket" node bad run
ok "the first one goes on" curl -sf --unix-socket "$work/site-a.sock" http://localhost/healthz
sed "s|listen: .*|listen: \"127.0.0.1:$port\"}|" "$work/site-b.yaml" >"$work/bad.yaml"
refused 2 'token' "serving on TCP needs a token file" node bad serve
echo secret-token-of-a-test >"$work/token"
chmod 600 "$work/token"
sed -i "s|^serve: {|serve: {token_file: token, |" "$work/bad.yaml"
refused 3 "$port" "a taken port to serve on" node bad serve
stop_gently site-a aggregator
