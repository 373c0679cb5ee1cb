#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test through ctest.
#   scripts/test.sh [--preset dev|release|asan|tsan] [ctest arguments]
# The asan and tsan presets leave out the tests labelled slow.
. "$(dirname "$0")/setup.sh"

preset=release
if [ "${1:-}" = --preset ]; then
    preset=${2:?--preset needs a name}
    shift 2
fi
install_missing
eval "$("$root/scripts/fetch-model.sh")"
export CONSILIUM_MODEL=$MODEL ICD_XML
build_preset "$preset"
say "testing ($preset)"
cd "$root"
ctest --preset "$preset" -j "$(nproc)" "$@"
