#!/usr/bin/env bash
# The whole loop on this machine: one aggregator and five hospitals as separate processes, a real model, real text.
#   scripts/demo.sh [--data DIR] [--rounds N] [--sites N] [--model FILE] [--compare] [--quick]
#   --data DIR    site-*.jsonl (three or more) and eval.jsonl of your own instead of the ICD-10-CM hospitals
#   --rounds N    rounds of training;  --sites N  how many of the sites take part (three or more)
#   --model FILE  another GGUF of the llama architecture
#   --compare     also the best hospital alone and the federated run without differential privacy
#   --quick       under a minute: the same path, fewer rounds, a smaller evaluation
# Ends with a table and build/demo/report.json. This script starts programs and reads their journals; everything of the
# protocol is in the two daemons.
. "$(dirname "$0")/setup.sh"

{ # read as a whole before it runs: an edit of this file does not disturb a run under way
data='' rounds='' sites='' model='' compare=no quick=no
while [ $# -gt 0 ]; do
    case $1 in
    --data | --rounds | --sites | --model)
        [ $# -ge 2 ] || die "$1 needs a value"
        declare "${1#--}=$2"
        shift 2 ;;
    --compare) compare=yes; shift ;;
    --quick) quick=yes; shift ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "unknown argument $1; see --help" ;;
    esac
done
for number in "$rounds" "$sites"; do
    [[ $number =~ ^([1-9][0-9]{0,3})?$ ]] || die "'$number' is not a number from 1 to 9999"
done
if [ -n "$data" ]; then # what is wrong with the folder is said before anything is fetched, built or trained
    [ -d "$data" ] || die "--data $data: no such folder"
    [ -s "$data/eval.jsonl" ] || die "$data/eval.jsonl is missing or empty"
    found=$(find "$data" -maxdepth 1 -name 'site-*.jsonl' | wc -l)
    [ "$found" -ge 3 ] || die "$data has $found site-*.jsonl files; a federation needs three or more"
fi
[ -z "$sites" ] || [ "$sites" -ge 3 ] || die "--sites $sites: a federation needs three or more"
[ -z "$model" ] || [ -f "$model" ] || die "--model $model: no such file"

install_missing
fetched=$("$root/scripts/fetch-model.sh")
eval "$fetched"
[ -z "$model" ] || MODEL=$(realpath "$model")
build_preset release
bin=$root/build/release/bin
work=$root/build/demo
rm -rf "$work"
mkdir -p "$work"
cores=$(nproc)

# --- data ---------------------------------------------------------------------------------------------------------------
if [ -z "$data" ]; then
    data=$work/data
    say "data: ICD-10-CM diagnosis texts to chapters, split over five hospitals (public codes, not patients)"
    python3 "$root/scripts/demo-data.py" "$ICD_XML" "$data" >"$work/data.txt"
    own_data=no
else
    data=$(realpath "$data")
    own_data=yes
fi
[ -f "$data/eval.jsonl" ] || die "$data/eval.jsonl is missing"
mapfile -t files < <(find "$data" -maxdepth 1 -name 'site-*.jsonl' | sort)
[ ${#files[@]} -ge 3 ] || die "$data has ${#files[@]} site-*.jsonl files; a federation needs three or more"
[ -z "$sites" ] || files=("${files[@]:0:$sites}")
n=${#files[@]}
[ "$n" -ge 3 ] || die "--sites $n: a federation needs three or more"
names=()
for file in "${files[@]}"; do
    name=$(basename "$file" .jsonl)
    [[ $name =~ ^[a-z0-9-]{1,63}$ ]] || die "$file: a site's name may hold a-z, 0-9 and - only"
    names+=("$name")
done

# --- the learning problem; how it was chosen is in bench/peers/README.md --------------------------------------------------
: "${rounds:=$([ "$quick" = yes ] && echo 2 || echo 12)}"
targets=q,v rank=8 alpha=16
optimizer=sgd learning_rate=25 decay=0.8 clip=0.6 local_options="momentum=0;decay=0.8;system=none"
server_optimizer=fedavg server_learning_rate=1 server_momentum=0
steps=2 batch=32 max_tokens=64 eval_records=300
if [ "$own_data" = yes ]; then
    # Long records cost more, so fewer of them are sampled: about 150,000 tokens in all keep two cores under three minutes.
    max_tokens=1024
    lines=$(cat "${files[@]}" | wc -l)
    [ "$lines" -gt 0 ] || die "the site-*.jsonl files in $data are empty"
    tokens=$(($(cat "${files[@]}" | wc -c) / lines / 4 + 1))
    batch=$((150000 / (tokens * n * rounds * steps)))
    batch=$((batch < 4 ? 4 : batch > 32 ? 32 : batch))
fi
[ "$quick" = no ] || { batch=$((batch < 16 ? batch : 16)); eval_records=90; }

. "$root/scripts/demo-federation.sh"

trap stop_all EXIT
started=$(date +%s%N)
run_federation main record "$work/main"
evaluate_federation main
ask_question main
ended=$(date +%s%N)
if [ "$compare" = yes ]; then
    run_comparisons
fi
write_report
print_table
exit 0
}
