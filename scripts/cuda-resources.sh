#!/usr/bin/env bash
# What nvcc says of the CUDA kernels: registers, and what spills. Needs the CUDA toolkit, no card; minutes an architecture.
#   scripts/cuda-resources.sh [ARCHITECTURE...]     default: sm_80 sm_89 sm_90a
# A line a source: its kernels, the most registers of any of them, and how many spill; then each kernel that does.
. "$(dirname "$0")/setup.sh"

case ${1:-} in -h | --help) sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
[ $# -gt 0 ] || set -- sm_80 sm_89 sm_90a
PATH=$PATH:/usr/local/cuda/bin
command -v nvcc >/dev/null || die "nvcc is missing: install the CUDA toolkit"
cd "$root"
work=$(mktemp -d "${TMPDIR:-/tmp}/consilium-resources-XXXXXX")
trap 'rm -rf "$work"' EXIT

# One source for one architecture: "name registers spilled_bytes" a kernel.
kernels_of() { # ARCHITECTURE SOURCE
    local options=()
    [[ $1 != *90a ]] || options=(-DCUDA_SM_90A)
    nvcc -std=c++17 -O2 -I. -arch="$1" "${options[@]}" -D_GNU_SOURCE -cubin -Xptxas -v -o "$work/cubin" "$2" 2>"$work/log" ||
        { cat "$work/log" >&2; die "$2 does not compile for $1"; }
    awk '/Compiling entry function/ { split($0, part, "\047"); name = part[2] }
        /bytes spill stores/ { for (i = 2; i <= NF; i++) if ($i == "spill" && $(i + 1) ~ /^stores/) spilled = $(i - 2) }
        /Used [0-9]+ registers/ { for (i = 2; i <= NF; i++) if ($i ~ /^registers/) print name, $(i - 1), spilled + 0 }' "$work/log"
}

printf '%-8s %-24s %8s %10s %8s\n' "" source kernels registers spilling
for architecture in "$@"; do
    for source in kernels/cuda/*.cu; do
        kernels_of "$architecture" "$source" >"$work/kernels"
        [ -s "$work/kernels" ] || continue
        awk -v a="$architecture" -v s="$(basename "$source")" '
            { n++; if ($2 > most) most = $2; spill += $3 > 0 }
            END { printf "%-8s %-24s %8d %10d %8d\n", a, s, n, most, spill }' "$work/kernels"
        awk '$3 > 0 { print $3, $1 }' "$work/kernels" | while read -r bytes name; do
            printf '%33s %s spills %d bytes\n' "" "$(c++filt "$name" | sed "s/(.*//; s/void //")" "$bytes"
        done
    done
done
