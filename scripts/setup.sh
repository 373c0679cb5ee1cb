# Sourced by the other scripts: finds the tree, installs missing packages, builds a preset.
# shellcheck shell=bash
set -euo pipefail
export LC_ALL=C.UTF-8 # the same column counts, sorting and decimal points whatever the user's language is

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# Packages of scripts/packages.txt, and of the arguments, that dpkg does not know as installed.
missing_packages() {
    local package
    { sed -e 's/#.*//' "$root/scripts/packages.txt"; printf '%s\n' "$@"; } | sed '/^[[:space:]]*$/d' | while read -r package; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || printf '%s ' "$package"
    done
}

# install_missing [more packages]
install_missing() {
    local missing as_root=()
    missing=$(missing_packages "$@")
    [ -n "$missing" ] || return 0
    say "installing: $missing"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "these packages are missing and neither root nor sudo is at hand: $missing"
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update -qq >&2 || die "apt-get update failed: is this Debian with its package sources reachable?"
    # shellcheck disable=SC2086 # a list of names
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Dpkg::Use-Pty=0 \
        --no-install-recommends $missing >/dev/null ||
        die "apt-get install failed for: $missing"
}

# build_preset NAME: configures and builds build/NAME.
build_preset() {
    say "building ($1)"
    (cd "$root" && cmake --preset "$1" >/dev/null && cmake --build --preset "$1" -- --quiet) >&2 ||
        die "the build failed: cmake --preset $1 && cmake --build --preset $1"
}
