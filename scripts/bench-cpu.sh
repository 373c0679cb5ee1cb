#!/usr/bin/env bash
# Training and inference on this machine's CPU beside PyTorch + PEFT and llama.cpp: called by scripts/bench.sh cpu.
#   scripts/bench.sh cpu [--quick] [--threads N] [--model FILE] [--no-build] [--no-peers] [--out DIR] [--under COMMAND]
#                        [--only PART] [--write]
#     --quick          fewer sequences and peers, no scaling tables: some minutes instead of an hour
#     --threads N      2
#     --model FILE     the Q4_1 file of SmolLM2-135M-Instruct (default: as scripts/fetch-model.sh finds or fetches it)
#     --no-build       build/release is taken as it is
#     --no-peers       ours only
#     --out DIR        where lines.jsonl, table.md and log.txt go, instead of build/release/results-cpu
#     --under COMMAND  before the command that runs the programs of a table's lines: taskset -c 0,1, nice, a lock
#     --only PART      train, infer or scaling; lines of an earlier run's other parts in --out are kept
#     --write          puts the table between the markers of docs/performance.md
#     $CONSILIUM_PYTHON is an interpreter with torch, transformers, peft and llama_cpp (bench/peers/setup.sh makes one).
. "$(dirname "$0")/setup.sh"

{
usage() { sed -n '2,15s/^# \{0,1\}//p' "$root/scripts/bench-cpu.sh"; }
build=$root/build/release out='' quick=no do_build=yes peers=yes threads=2 model='' under=() only='' write=no
while [ $# -gt 0 ]; do
    case $1 in
    --out | --threads | --model | --under | --only)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
        --out) out=$2 ;;
        --threads) threads=$2 ;;
        --model) model=$2 ;;
        --under) read -ra under <<<"$2" ;;
        --only) only=$2 ;;
        esac
        shift 2 ;;
    --quick) quick=yes; shift ;;
    --no-build) do_build=no; shift ;;
    --no-peers) peers=no; shift ;;
    --write) write=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown argument $1; see --help" ;;
    esac
done
case $only in '' | train | infer | scaling) ;; *) die "--only $only: there are train, infer and scaling" ;; esac
cd "$root"
if [ "$do_build" = yes ]; then
    cmake --preset release >/dev/null && cmake --build --preset release --target bench_train bench_infer >/dev/null ||
        die "the build failed: cmake --build --preset release says why"
fi
python=${CONSILIUM_PYTHON:-python3}
out=${out:-$build/results-cpu}
mkdir -p "$out"
lines=$out/lines.jsonl
touch "$lines"
for part in train infer scaling; do # this run's parts begin anew
    if [ -z "$only" ] || [ "$only" = $part ]; then
        grep -v "\"part\":\"$part\"" "$lines" >"$lines.new" || true
        mv "$lines.new" "$lines"
    fi
done
if [ -z "$model" ]; then
    model=$(scripts/fetch-model.sh | sed -n 's/^MODEL=//p')
fi
[ -f "$model" ] || die "no model file $model"

# measure PART --run LABEL COMMAND... [--run ...]: appends a line {"part", "label", ...} of each program, those that are
# given --turns in turn with the others.
measure() {
    local part=$1
    shift
    printf '%s\n' "$*" | tee -a "$out/log.txt" >&2
    "${under[@]}" python3 bench/in_turns.py --part "$part" --lines "$lines" --log "$out/log.txt" "$@"
}

train=$build/bench/train infer=$build/bench/infer
sequences=32 rounds=9 modes='f32 f32-compile bf16 bf16-compile' precisions='f32 bf16'
grep -qE "avx512_(bf16|vnni)" /proc/cpuinfo || precisions=f32 # training computes float32 then, whatever was asked for
if [ "$quick" = yes ]; then
    sequences=4 rounds=3 modes='f32 bf16'
fi

measure_train() {
    local precision mode steps runs=()
    for precision in $precisions; do
        runs+=(--run "consilium $precision" "$train" --model "$model" --threads "$threads" --batch $sequences
            --precision $precision --dp on --turns --json)
    done
    if [ "$peers" = yes ]; then
        for mode in $modes; do
            steps=$sequences
            case $mode in bf16*) steps=$((sequences < 4 ? sequences : 4)) ;; esac # several times slower
            runs+=(--run "PyTorch $mode" "$python" bench/peers/cpu_peer.py --threads "$threads" --modes "$mode"
                --steps $steps --turns --json)
        done
    fi
    measure train "${runs[@]}"
}

measure_infer() {
    local type file precision runs
    for type in Q4_1 Q8_0 Q4_K_M; do
        file=$model
        if [ $type != Q4_1 ]; then
            file=$out/SmolLM2-135M-Instruct.$type.gguf
            [ "$peers" = yes ] || [ -f "$file" ] || continue
            [ -f "$file" ] || "$python" bench/peers/llama_peer.py --quantise $type --from "$model" --to "$file" ||
                die "llama.cpp made no $type file"
        fi
        runs=()
        for precision in f32 bf16; do
            runs+=(--run "$type consilium $precision" "$infer" --model "$file" --threads "$threads"
                --precision $precision --rounds $rounds --turns --json)
        done
        if [ "$peers" = yes ]; then
            runs+=(--run "$type llama.cpp" "$python" bench/peers/llama_peer.py --model "$file" --threads "$threads"
                --rounds $rounds --turns --json)
        fi
        measure infer "${runs[@]}"
    done
}

measure_scaling() {
    local n
    for n in 1 2; do
        measure scaling --run "threads $n" "$train" --threads $n --batch 4 --json
        measure scaling --run "threads $n" "$infer" --threads $n --json
    done
    for n in 64 128 256 512 1024 2048 4096; do
        measure scaling --run "tokens $n" "$train" --threads "$threads" --seq $n --batch $((4096 / n > 16 ? 16 : 4096 / n)) --json
    done
    for n in 1 5 10 20 30; do
        measure scaling --run "layers $n" "$train" --threads "$threads" --layers $n --batch 4 --no-ceiling --json
    done
    for n in 0 1 2; do
        measure scaling --run "4 GB, 4096 tokens, level $n" bash -c 'ulimit -v 4194304; exec "$@"' - "$train" \
            --threads "$threads" --seq 4096 --batch 1 --level $n --no-ceiling --json
    done
}

if [ -z "$only" ] || [ "$only" = train ]; then
    measure_train
fi
if [ -z "$only" ] || [ "$only" = infer ]; then
    measure_infer
fi
if [ "$only" = scaling ] || { [ -z "$only" ] && [ "$quick" = no ]; }; then
    measure_scaling
fi
options=()
[ "$write" = no ] || options=(--write docs/performance.md)
python3 bench/cpu_table.py "$lines" "${options[@]}" | tee "$out/table.md"
exit
}
