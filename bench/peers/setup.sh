#!/usr/bin/env bash
# Makes the Python environment of the peers (PyTorch and friends) outside the repository; a second call does nothing.
#   bench/peers/setup.sh     prints the interpreter's path
# The environment is $CONSILIUM_PEERS/venv, else ~/.cache/consilium/peers/venv. The product itself needs none of this.
set -euo pipefail
peers=${CONSILIUM_PEERS:-${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/consilium/peers}
python=$peers/venv/bin/python
if ! [ -f "$peers/ready" ]; then
    python3 -m venv "$peers/venv" || { echo "setup.sh: apt-get install python3-venv" >&2; exit 1; }
    "$python" -m pip --quiet install torch transformers peft gguf llama-cpp-python numpy >&2
    : >"$peers/ready"
fi
printf '%s\n' "$python"
