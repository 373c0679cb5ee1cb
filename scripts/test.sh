#!/usr/bin/env bash
# Installs what is missing, builds, runs every test through ctest, and fuzzes the parsers for less than two minutes.
#   scripts/test.sh [--preset dev|release|asan|tsan] [--no-fuzz] [ctest arguments]
# The asan and tsan presets leave out the tests labelled slow. With ctest arguments nothing is fuzzed: scripts/fuzz.sh is
# for that.
. "$(dirname "$0")/setup.sh"

preset=release fuzz=yes
while :; do
    case ${1:-} in
    --preset) preset=${2:?--preset needs a name}; shift 2 ;;
    --no-fuzz) fuzz=no; shift ;;
    *) break ;;
    esac
done
[ $# -eq 0 ] || fuzz=no
install_missing
eval "$("$root/scripts/fetch-model.sh")"
export CONSILIUM_MODEL=$MODEL ICD_XML
build_preset "$preset"
say "testing ($preset)"
cd "$root"
ctest --preset "$preset" -j "$(nproc)" "$@"
[ "$fuzz" = no ] || "$root/scripts/fuzz.sh" --seconds 100
