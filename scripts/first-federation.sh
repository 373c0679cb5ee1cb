#!/usr/bin/env bash
# docs/first-federation.md as a rehearsal: three sites, an aggregator and an offline governance key, as five users of this
# machine who cannot read each other's homes, from `init` to the first signed round.
#   scripts/first-federation.sh [--keep]
#   --keep   leaves users and homes in place and prints where they are
# Needs root (it makes the users consilium-a, -b, -c, -agg and -gov, and removes them again). Every command is shown with the
# user who types it; every file that changes hands is shown as well. Ends with PASS, or says what failed and exits 1.
. "$(dirname "$0")/setup.sh"

keep=no
case "${1:-}" in
--keep) keep=yes ;;
'') ;;
*) die "unknown argument $1; usage: first-federation.sh [--keep]" ;;
esac
[ "$(id -u)" -eq 0 ] || die "needs root: it makes five users"
sites=(a b c)
users=(consilium-agg consilium-gov consilium-a consilium-b consilium-c)
for user in "${users[@]}"; do
    ! id "$user" >/dev/null 2>&1 || die "a user $user exists already; remove it first (userdel $user)"
done

install_missing
fetched=$("$root/scripts/fetch-model.sh")
eval "$fetched"
build_preset release
base=$(mktemp -d /var/tmp/consilium-first.XXXXXX)
port=$((20000 + $$ % 20000))
declare -A daemon_of=()
made=()

clean_up() {
    local status=$? user
    for user in "${!daemon_of[@]}"; do kill "${daemon_of[$user]}" 2>/dev/null || true; done
    wait 2>/dev/null || true
    if [ "$keep" = yes ]; then
        echo "kept: $base and the users ${made[*]}" >&2
    else
        for user in "${made[@]}"; do userdel "$user" 2>/dev/null || echo "could not remove user $user" >&2; done
        rm -rf "$base"
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 1' INT TERM

home_of() { printf '%s/%s' "$base" "${1#consilium-}"; }
become() { # USER COMMAND...: turns this (sub)shell into the command, as that user, in that user's home
    local user=$1 home
    shift
    home=$(home_of "$user")
    exec setpriv --reuid="$user" --regid="$user" --clear-groups env -i -C "$home" HOME="$home" \
        PATH="$base/bin:/usr/bin:/bin" "$@"
}
quietly() { (become "$@"); }
at() { # the same, shown
    printf '\n%s$' "$1"
    printf ' %s' "${@:2}"
    printf '\n'
    quietly "$@" 2>&1 || die "failed as $1: ${*:2}"
}
shown() { awk -v key="$1" '$1 == key { print $2 }' "$base/out"; } # one value of the screen kept in $base/out
refused() { # EXIT_CODE USER COMMAND...: shown, and must fail with that exit code
    local want=$1 got=0
    shift
    printf '\n%s$' "$1"
    printf ' %s' "${@:2}"
    printf '\n'
    quietly "$@" 2>&1 || got=$?
    echo "(exit $got)"
    [ "$got" -eq "$want" ] || die "expected exit $want, got $got"
}
carry() { # FROM FILE TO [NAME]: what one party sends another; root plays the courier
    local name=${4:-$(basename "$2")}
    printf '\n   >> %s sends %s to %s\n' "$1" "$name" "$3"
    install -o "$3" -m 0600 "$(home_of "$1")/$2" "$(home_of "$3")/$name"
}
give() { install -o "$1" -m 0600 /dev/stdin "$(home_of "$1")/$2"; } # USER NAME: stdin becomes that user's file
start() { # USER COMMAND...: a daemon
    printf '\n%s$' "$1"
    printf ' %s' "${@:2}"
    printf ' &\n'
    become "$@" 2>>"$(home_of "$1")/daemon.log" &
    daemon_of[$1]=$!
}
wait_for() { # SECONDS WHAT COMMAND...: until the command succeeds
    local left=$(($1 * 5)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || die "waited in vain for $what"
        sleep 0.2
    done
}

# --- five machines ----------------------------------------------------------------------------------------------------
say "users, homes, programs, records"
chmod 711 "$base"
install -d -m 755 "$base/bin" "$base/model" "$base/data"
install -m 755 "$root"/build/release/bin/consilium-* "$base/bin"
install -m 644 "$MODEL" "$base/model/model.gguf"
python3 "$root/scripts/demo-data.py" "$ICD_XML" "$base/data" >/dev/null
for user in "${users[@]}"; do
    useradd --system --no-create-home --home-dir "$(home_of "$user")" --shell /usr/sbin/nologin "$user"
    made+=("$user")
    install -d -o "$user" -m 0700 "$(home_of "$user")"
done
for s in "${sites[@]}"; do
    head -n 600 "$base/data/site-$s.jsonl" | give "consilium-$s" records.jsonl
    give "consilium-$s" node.yaml <<YAML
version: 1
site: clinic-$s
state: state
aggregator: {url: "tcp://127.0.0.1:$port", federation: first}
model: {path: ../model/model.gguf}
data: {path: records.jsonl}
policy: {consent: ask, max_epsilon: 8, delta: 0.00001}
YAML
done
rm -rf "$base/data"
give consilium-agg aggregator.yaml <<YAML
version: 1
federation: first
state: state
listen: {url: "tcp://127.0.0.1:$port", names: [127.0.0.1]}
YAML
give consilium-agg job.yaml <<'YAML'
version: 1
job: chapters
model: {card: model.json}
lora: {layer_first: 26, targets: [q, v], rank: 8, alpha: 16, mode: ffa}
rounds: {count: 2, min_sites: 3, train_deadline: 10m, stage_deadline: 1m}
train: {steps: 2, batch: 16, learning_rate: 15, optimizer: sgd, max_tokens: 128, system: none}
dp: {mode: record, clip: 0.6, epsilon: 6, delta: 0.00001}
YAML
! quietly consilium-a cat "$(home_of consilium-b)/records.jsonl" 2>/dev/null || die "consilium-a can read consilium-b's home"

# --- 1. keys ------------------------------------------------------------------------------------------------------------
say "1. everybody makes keys"
at consilium-gov consilium-governance key governance.key | tee "$base/out"
governance_fingerprint=$(shown fingerprint)
at consilium-agg consilium-aggregator -c aggregator.yaml init | tee "$base/out"
ca_fingerprint=$(shown ca_fingerprint)
at consilium-agg consilium-governance key author.key
declare -A key_of=()
for s in "${sites[@]}"; do
    at "consilium-$s" consilium-node -c node.yaml init | tee "$base/out"
    key_of[$s]=$(shown key_fingerprint)
done

# --- 2. certificates ------------------------------------------------------------------------------------------------------
say "2. the coordinating team signs the sites' requests, after hearing each key fingerprint from its site"
for s in "${sites[@]}"; do
    carry "consilium-$s" state/site.csr consilium-agg "clinic-$s.csr"
    at consilium-agg consilium-aggregator -c aggregator.yaml ca approve "clinic-$s.csr" --out "clinic-$s.crt" --yes | tee "$base/out"
    [ "$(shown key_fingerprint)" = "${key_of[$s]}" ] || die "clinic-$s told another fingerprint"
done

# --- 3. roster --------------------------------------------------------------------------------------------------------------
say "3. the roster: drafted by the coordinating team, signed offline"
at consilium-agg consilium-aggregator -c aggregator.yaml roster draft --authors author.key.pub --out roster.json
carry consilium-agg roster.json consilium-gov
at consilium-gov consilium-governance sign roster.json --key governance.key --out roster.bin --yes
carry consilium-gov roster.bin consilium-agg
carry consilium-gov governance.key.pub consilium-agg
at consilium-agg consilium-aggregator -c aggregator.yaml roster install roster.bin --governance governance.key.pub

# --- 4. enrolment -----------------------------------------------------------------------------------------------------------
say "4. the sites enrol; both fingerprints reach them by telephone or on paper"
for s in "${sites[@]}"; do
    carry consilium-agg "clinic-$s.crt" "consilium-$s" site.crt
    carry consilium-agg state/ca.crt "consilium-$s"
    carry consilium-agg roster.bin "consilium-$s"
    carry consilium-agg governance.key.pub "consilium-$s"
done
enroll=(consilium-node -c node.yaml enroll --certificate site.crt --ca ca.crt --roster roster.bin --governance governance.key.pub)
refused 6 consilium-a "${enroll[@]}" --ca-fingerprint "${ca_fingerprint//[0-4]/5}" --governance-fingerprint "$governance_fingerprint"
[ ! -e "$(home_of consilium-a)/state/roster.bin" ] || die "a refused enrolment stored something"
for s in "${sites[@]}"; do
    at "consilium-$s" "${enroll[@]}" --ca-fingerprint "$ca_fingerprint" --governance-fingerprint "$governance_fingerprint"
done

# --- 5. connection ------------------------------------------------------------------------------------------------------------
say "5. the aggregator starts, the sites look before they join"
start consilium-agg consilium-aggregator -c aggregator.yaml run
for s in "${sites[@]}"; do
    at "consilium-$s" consilium-node -c node.yaml preflight
done
for s in "${sites[@]}"; do
    start "consilium-$s" consilium-node -c node.yaml run
    wait_for 30 "clinic-$s to connect" grep -q '"connected"' "$(home_of "consilium-$s")/state/journal.jsonl"
done

# --- 6. the job -----------------------------------------------------------------------------------------------------------------
say "6. a plan author submits a job; the sites are asked"
quietly consilium-a consilium-node model describe ../model/model.gguf | give consilium-agg model.json
at consilium-agg consilium-aggregator -c aggregator.yaml job validate job.yaml
at consilium-agg consilium-aggregator -c aggregator.yaml job submit job.yaml --author-key author.key
for s in "${sites[@]}"; do
    wait_for 60 "the job to be offered to clinic-$s" quietly "consilium-$s" consilium-node -c node.yaml consent show chapters
done
at consilium-a consilium-node -c node.yaml consent list
at consilium-a consilium-node -c node.yaml consent show chapters
for s in "${sites[@]}"; do # each site names the plan that it read
    plan=$(quietly "consilium-$s" consilium-node -c node.yaml consent show chapters --format json | jq -r .plan)
    at "consilium-$s" consilium-node -c node.yaml consent approve chapters --plan "$plan"
done

# --- 7. the round ---------------------------------------------------------------------------------------------------------------
say "7. the first round"
at consilium-agg consilium-aggregator -c aggregator.yaml job watch chapters
at consilium-agg consilium-aggregator -c aggregator.yaml model list chapters
for s in "${sites[@]}"; do at "consilium-$s" consilium-node -c node.yaml model list; done
at consilium-a consilium-node -c node.yaml privacy report
signed=$(quietly consilium-agg consilium-aggregator -c aggregator.yaml model list chapters --format json | jq -r '.[-1] | select(.cosigned) | .adapter_sha256')
[ -n "$signed" ] || die "no version was co-signed"
for s in "${sites[@]}"; do
    held=$(quietly "consilium-$s" consilium-node -c node.yaml model list --format json | jq -r '.[-1].adapter_sha256')
    [ "$held" = "$signed" ] || die "clinic-$s holds $held, the signed version is $signed"
done
printf '\nPASS: three sites hold the co-signed adapter %s\n' "$signed"
