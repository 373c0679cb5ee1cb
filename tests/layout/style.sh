#!/usr/bin/env bash
# Formatting, file sizes and words that mark unfinished work.
set -uo pipefail
export LC_ALL=C.UTF-8 # columns are characters, not bytes
cd "$1" || exit 1
failures=0
fail() { echo "$*"; failures=$((failures + 1)); }
mapfile -t sources < <(find base kernels model privacy crypto protocol runtime node aggregator tests bench -name '*.[ch]' -o -name '*.cu' -o -name '*.cpp' | sort)
[ ${#sources[@]} -gt 0 ] || { echo "no sources found"; exit 1; }
for file in "${sources[@]}"; do
    lines=$(wc -l <"$file")
    [ "$lines" -le 1000 ] || fail "$file: $lines lines; one idea a file (limit 1000)"
    grep -nE '.{121,}' "$file" | head -1 | sed "s|^|$file: longer than 120 columns: |" | cut -c1-160 | grep . && failures=$((failures + 1))
done
words=$(grep -nE '\b(TODO|FIXME|XXX)\b' "${sources[@]}") && fail "$words"
if command -v clang-format >/dev/null && clang-format --version | grep -q 'version 14'; then
    while read -r file; do
        fail "$file: not formatted: clang-format -i $file"
    done < <(clang-format --dry-run -Werror "${sources[@]}" 2>&1 | sed -nE 's/^([^:]+\.(c|h|cu|cpp)):[0-9]+:.*/\1/p' | sort -u)
else
    echo "clang-format 14 is not installed: formatting not checked"
fi
echo "${#sources[@]} files, $failures failures"
[ "$failures" -eq 0 ]
