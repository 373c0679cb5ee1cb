#!/usr/bin/env bash
# Fuzzes the parsers of what others wrote: builds the preset fuzz (clang) and runs its programs.
#   scripts/fuzz.sh [--seconds N] [--jobs N] [--merge] [target...]
# N seconds in all (default 3600), --jobs targets at a time (default: one per CPU), all targets by default. Each starts
# from tests/fuzz/corpus/TARGET and from what earlier runs kept in build/fuzz/found/TARGET. A target that crashes, reads
# outside its input, leaks or takes more than 20 seconds or 2 GB ends this with 1; its input is in build/fuzz/crashes.
# --merge puts the smallest set that reaches what is known into tests/fuzz/corpus (and keeps regression-* there).
. "$(dirname "$0")/setup.sh"

seconds=3600 jobs=$(nproc) merge=no
while [ $# -gt 0 ]; do
    case $1 in
    --seconds) seconds=${2:?--seconds needs a number}; shift 2 ;;
    --jobs) jobs=${2:?--jobs needs a number}; shift 2 ;;
    --merge) merge=yes; shift ;;
    -*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) break ;;
    esac
done
install_missing clang libclang-rt-14-dev # libFuzzer is part of clang's runtime
say "building (fuzz)"
(cd "$root" && cmake --preset fuzz >/dev/null && cmake --build --preset fuzz -- --quiet) >&2 ||
    die "the build failed: cmake --preset fuzz && cmake --build --preset fuzz"

build=$root/build/fuzz corpus=$root/tests/fuzz/corpus
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    mapfile -t targets < <(cd "$build/bin" && printf '%s\n' fuzz_* | sed 's/^fuzz_//')
fi
each=$((seconds * jobs / ${#targets[@]}))
[ "$each" -le "$seconds" ] || each=$seconds
[ "$each" -ge 1 ] || die "--seconds $seconds is less than a second for each of ${#targets[@]} targets"
mkdir -p "$build/crashes" "$build/logs"

fuzz_one() {
    local target=$1 words=() log=$build/logs/$1
    [ -x "$build/bin/fuzz_$target" ] || die "there is no target $target"
    mkdir -p "$build/found/$target"
    [ ! -e "$root/tests/fuzz/$target.dict" ] || words=("-dict=$root/tests/fuzz/$target.dict")
    if "$build/bin/fuzz_$target" -max_total_time="$each" -max_len=65536 -timeout=20 -rss_limit_mb=2048 \
        -artifact_prefix="$build/crashes/$target-" "${words[@]}" "$build/found/$target" "$corpus/$target" >"$log" 2>&1; then
        printf '%-14s %s\n' "$target" "$(grep -E '^#[0-9]+.*DONE' "$log" | tr '\t' ' ' | tr -s ' ')"
    else
        printf '%-14s FAILED, see %s:\n' "$target" "$log"
        tail -60 "$log"
        return 1
    fi
}

merge_one() {
    local target=$1 small
    small=$(mktemp -d)
    # Edges alone, not how often each was taken: a few dozen files instead of hundreds.
    "$build/bin/fuzz_$target" -merge=1 -set_cover_merge=1 -use_counters=0 -max_len=65536 "$small" "$corpus/$target" \
        "$build/found/$target" >"$build/logs/$target.merge" 2>&1 || die "merging failed, see $build/logs/$target.merge"
    find "$corpus/$target" -type f ! -name 'regression-*' -delete
    cp "$small"/* "$corpus/$target"
    rm -r "$small"
    printf '%-14s %d files, %d bytes\n' "$target" "$(find "$corpus/$target" -type f | wc -l)" \
        "$(cat "$corpus/$target"/* | wc -c)"
}

say "fuzzing ${#targets[@]} targets, $each seconds each, $jobs at a time"
export -f fuzz_one say die
export root build corpus each
printf '%s\n' "${targets[@]}" | xargs -P "$jobs" -I{} bash -c 'fuzz_one {}' || die "a target failed"
if [ "$merge" = yes ]; then
    say "merging"
    for target in "${targets[@]}"; do merge_one "$target"; done
fi
