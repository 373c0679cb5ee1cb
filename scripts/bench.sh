#!/usr/bin/env bash
# Benchmarks that print one table.
#   scripts/bench.sh gpu [--quick] [--shapes "A B"] [--no-build] [--build-dir DIR] [--out DIR] [--no-peers] [--sanitize]
#     On a machine with an NVIDIA GPU, the CUDA toolkit, a C compiler, CMake and Python: checks the kernels first, then
#     measures training and decoding on three shapes (smollm2-135m llama-3.2-1b glm-4-9b) against PyTorch + PEFT.
#     --quick          two shapes, fewer steps, no CUDA graph of the peer's
#     --shapes "A B"   these instead; qwen3-0.6b and gemma-3-270m too
#     --no-build       what is in the build folder is taken as it is
#     --build-dir DIR  instead of build/gpu
#     --out DIR        where result.json, table.txt, lines.jsonl and log.txt go, instead of the build folder's results/
#     --no-peers       ours only
#     --sanitize       the kernels' tests under compute-sanitizer too: slow
#     $CONSILIUM_PYTHON is an interpreter that has torch, transformers and peft (python3).
#   scripts/bench.sh cpu [--quick] ...     training and inference beside PyTorch + PEFT and llama.cpp; cpu --help says more
# The other benchmarks of a CPU are programs without a script: bench/ of a build folder (bench_gemm, bench_layer,
# bench_crypto, bench_transport), each with --json.
. "$(dirname "$0")/setup.sh"

{ # read as a whole before it runs: an edit of this file does not disturb a run under way
usage() { sed -n '2,17s/^# \{0,1\}//p' "$root/scripts/bench.sh"; }
case ${1:-} in
gpu) shift ;;
cpu) shift; exec "$root/scripts/bench-cpu.sh" "$@" ;;
'' | -h | --help) usage; exit 0 ;;
*) usage >&2; die "there is no benchmark $1" ;;
esac

build=$root/build/gpu out='' quick=no do_build=yes peers=yes sanitize=no shapes=''
while [ $# -gt 0 ]; do
    case $1 in
    --build-dir | --out | --shapes)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in --build-dir) build=$2 ;; --out) out=$2 ;; --shapes) shapes=$2 ;; esac
        shift 2 ;;
    --quick) quick=yes; shift ;;
    --no-build) do_build=no; shift ;;
    --no-peers) peers=no; shift ;;
    --sanitize) sanitize=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown argument $1; see --help" ;;
    esac
done
declare -A batch=([smollm2-135m]=32 [llama-3.2-1b]=4 [glm-4-9b]=2 [qwen3-0.6b]=8 [gemma-3-270m]=32 [tiny]=2)
declare -A tokens=([smollm2-135m]=512 [llama-3.2-1b]=2048 [glm-4-9b]=2048 [qwen3-0.6b]=2048
    [gemma-3-270m]=512 [tiny]=64)
modes=eager,compile,graph steps=20 peer_options=()
if [ "$quick" = yes ]; then
    modes=eager,compile steps=8 peer_options=(--seconds 2 --gemm-seconds 0.1)
fi
if [ -z "$shapes" ]; then
    shapes='smollm2-135m llama-3.2-1b glm-4-9b'
    [ "$quick" = no ] || shapes='smollm2-135m llama-3.2-1b'
fi
for shape in $shapes; do
    [ -n "${batch[$shape]:-}" ] || die "no shape $shape; there are ${!batch[*]}"
done
python=${CONSILIUM_PYTHON:-python3}
for tool in "$python" nvidia-smi timeout; do
    command -v "$tool" >/dev/null || die "$tool is missing: this needs Python and a machine with an NVIDIA GPU"
done
if [ -d /usr/local/cuda/bin ]; then
    PATH=$PATH:/usr/local/cuda/bin
fi
card=$(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader -i 0) ||
    die "nvidia-smi finds no GPU: $card"
IFS=, read -r gpu driver capability <<<"${card//, /,}"
mkdir -p "$build"
build=$(cd "$build" && pwd)
out=${out:-$build/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"

build_gpu() {
    local architecture=${capability/./}-real options=()
    [ "$capability" != 9.0 ] || architecture=90a-real # Hopper's own instructions
    if ! [ -f "$build/CMakeCache.txt" ] && command -v ninja >/dev/null; then
        options=(-G Ninja)
    fi
    say "building for $gpu ($architecture)"
    # Only this card's machine code: each further architecture takes as long again.
    if ! cmake -S . -B "$build" "${options[@]}" -DCONSILIUM_CORE_ONLY=ON -DCONSILIUM_CUDA=ON \
        -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_C_FLAGS_RELWITHDEBINFO='-O2 -g1' \
        -DCMAKE_CUDA_ARCHITECTURES="$architecture" >"$out/build.txt" 2>&1 ||
        ! cmake --build "$build" --parallel "$(nproc)" >>"$out/build.txt" 2>&1; then
        tail -n 40 "$out/build.txt" >&2
        die "the build failed; all of it is in $out/build.txt"
    fi
}

line() { "$python" bench/gpu_table.py --line "$@" >>"$out/lines.jsonl"; }

# run_test PROGRAM NAME COMMAND...: stops everything if it fails.
run_test() {
    local name=$1 status=0
    shift
    timeout 300 "$@" >"$out/test.txt" 2>&1 || status=$?
    cat "$out/test.txt" >>"$out/log.txt"
    case $status in
    0) line program=tests kind=test name="$name" result=passed ;;
    77) line program=tests kind=test name="$name" result=skipped
        printf '%s skipped: %s\n' "$name" "$(tail -n 1 "$out/test.txt")" >&2 ;;
    *) line program=tests kind=test name="$name" result=failed
        tail -n 40 "$out/test.txt" >&2
        die "$name failed with status $status: nothing is measured before it is right" ;;
    esac
}

test_all() {
    local tests=() test checker=''
    mapfile -t tests < <(find "$build/tests" -maxdepth 1 -type f -perm -u+x \
        \( -name 'test_*cuda*' -o -name 'test_model*' \) ! -name '*_shim' 2>/dev/null | sort) # the host's run in ctest
    [ ${#tests[@]} -gt 0 ] || die "$build/tests holds no test_*cuda* and no test_model*: build first"
    say "checking (${#tests[@]} test programs)"
    for test in "${tests[@]}"; do
        run_test "$(basename "$test")" "$test"
    done
    [ "$sanitize" = yes ] || return 0
    checker=$(command -v compute-sanitizer) || { echo "compute-sanitizer is not installed: left out" >&2; return 0; }
    say "checking under compute-sanitizer"
    for test in "${tests[@]}"; do
        case $test in */test_*cuda*)
            run_test "$(basename "$test") under memcheck" "$checker" --tool memcheck --error-exitcode 9 "$test" ;;
        esac
        case $test in */test_cuda_rows | */test_cuda_head | */test_cuda_arena | */test_cuda_gradients | \
            */test_cuda_attention | */test_cuda_decode)
            run_test "$(basename "$test") under racecheck" "$checker" --tool racecheck --error-exitcode 9 "$test" ;;
        esac
    done
}

# measure SECONDS KEY=VALUE... -- COMMAND...: appends the command's JSON lines, or one that says why there are none.
measure() {
    local seconds=$1 about=() status=0 reason
    shift
    while [ "$1" != -- ]; do
        about+=("$1")
        shift
    done
    shift
    printf '%s\n' "$*" | tee -a "$out/log.txt" >&2
    timeout "$seconds" "$@" >"$out/stdout.txt" 2>"$out/stderr.txt" || status=$?
    cat "$out/stdout.txt" "$out/stderr.txt" >>"$out/log.txt"
    grep '^{' "$out/stdout.txt" >>"$out/lines.jsonl" || [ $status -ne 0 ] || status=no-lines
    case $status in
    0) return ;;
    124) reason="not done in $seconds s" ;;
    no-lines) reason="it printed no JSON line" ;;
    *) reason=$(grep -v '^[[:space:]]*$' "$out/stderr.txt" | tail -n 1 | cut -c1-300 || true)
        reason="status $status${reason:+: $reason}" ;;
    esac
    printf '   %s\n' "$reason" >&2
    line "${about[@]}" "error=$reason"
}

measure_shape() {
    local shape=$1 dp base ours=("$build/bench/bench_gpu")
    local size=(--shape "$shape" --batch "${batch[$shape]}" --tokens "${tokens[$shape]}")
    say "$shape"
    if [ "$peers" = yes ]; then
        measure 240 program=gpu_peer kind=train "shape=$shape" -- "$python" bench/peers/gpu_peer.py "${size[@]}" \
            --rank 16 --labels all --modes "$modes" --steps "$steps" "${peer_options[@]}" --json
    fi
    for base in bf16 q4_1; do
        for dp in off on; do
            [ "$base $dp" != 'q4_1 on' ] || continue
            measure 120 program=bench_gpu kind=train "shape=$shape" dp=$dp base=$base -- "${ours[@]}" "${size[@]}" \
                --rank 16 --labels all --dp $dp --base $base --steps "$steps" --json
        done
    done
    measure 120 program=bench_gpu kind=train "shape=$shape" dp=off 'base=q4_1 kept' -- "${ours[@]}" "${size[@]}" \
        --rank 16 --labels all --dp off --base q4_1 --keep-quantised --steps "$steps" --json
    for base in bf16 q4_1; do
        measure 120 program=bench_gpu kind=decode "shape=$shape" base=$base -- "${ours[@]}" --decode --shape "$shape" \
            --base $base --json
    done
    if [ "$quick" = no ]; then
        for base in bf16 q4_1; do
            measure 120 program=bench_gpu kind=ops "shape=$shape" base=$base -- "${ours[@]}" --ops "${size[@]}" \
                --base $base --json
        done
    fi
}

[ "$do_build" = no ] || build_gpu
: >"$out/lines.jsonl"
: >"$out/log.txt"
line program=bench.sh kind=machine "gpu=$gpu" "driver=$driver" \
    "nvcc=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')"
test_all
have_peers='import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ("torch", "transformers", "peft"))))'
if [ "$peers" = yes ] && ! "$python" -c "$have_peers"; then
    echo "$python has no torch, transformers and peft: ours only (see bench/peers/setup.sh)" >&2
    peers=no
    for shape in $shapes; do
        line program=gpu_peer kind=train "shape=$shape" "error=$python has no torch, transformers and peft"
    done
fi
for shape in $shapes; do
    measure_shape "$shape"
done
rm -f "$out/stdout.txt" "$out/stderr.txt" "$out/test.txt"
"$python" bench/gpu_table.py "$out/lines.jsonl" --json "$out/result.json" | tee "$out/table.txt"
exit
}
