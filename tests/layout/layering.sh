#!/usr/bin/env bash
# Every #include "folder/file.h" of a library folder must follow an edge that its CMakeLists.txt declares (transitively).
#   layering.sh SOURCE_DIR EDGES_FILE     lines of EDGES_FILE: name folder dependency...
set -euo pipefail
source_dir=$1
declare -A folder_of edges_of
while read -r name folder rest; do
    folder_of[$name]=$folder
    edges_of[$name]=$rest
done <"$2"

reach() { # all names reachable from $1
    local seen=" $1 " queue=("$1") name next
    while [ ${#queue[@]} -gt 0 ]; do
        name=${queue[0]}
        queue=("${queue[@]:1}")
        for next in ${edges_of[$name]:-}; do
            case $seen in *" $next "*) ;; *) seen+="$next " queue+=("$next") ;; esac
        done
    done
    printf '%s' "$seen"
}

library_of() { # the library whose folder is the longest prefix of path $1
    local name best='' best_len=0
    for name in "${!folder_of[@]}"; do
        case $1 in "${folder_of[$name]}"/*)
            if [ ${#folder_of[$name]} -gt $best_len ]; then best=$name best_len=${#folder_of[$name]}; fi ;;
        esac
    done
    printf '%s' "$best"
}

failures=0 checked=0
while IFS=: read -r file _ include; do
    header=$(sed -E 's/.*"([^"]+)".*/\1/' <<<"$include")
    from=$(library_of "$file") to=$(library_of "$header")
    [ -n "$from" ] || continue
    checked=$((checked + 1))
    if [ -z "$to" ]; then
        echo "$file: \"$header\" names no known folder (includes are written from the project's root)"
        failures=$((failures + 1))
        continue
    fi
    case $(reach "$from") in *" $to "*) ;; *)
        echo "$file: includes \"$header\", but ${folder_of[$from]}/CMakeLists.txt does not depend on $to"
        failures=$((failures + 1)) ;;
    esac
done < <(cd "$source_dir" && grep -nE '^#include "' -r --include='*.[ch]' --include='*.cu' --include='*.cpp' base kernels model privacy crypto protocol runtime node aggregator)
# Promises of docs/architecture.md that no dependency list may soften.
forbid() { case $(reach "$1") in *" $2 "*) echo "$1 must never depend on $2"; failures=$((failures + 1)) ;; esac; }
for library in model kernels privacy formats node; do forbid aggregator $library; done
forbid node aggregator
forbid privacy kernels
for library in crypto runtime protocol; do forbid model $library; forbid kernels $library; done
echo "$checked includes checked, $failures failures"
[ "$checked" -gt 0 ] && [ "$failures" -eq 0 ]
