#!/usr/bin/env bash
# Makes the peers' two virtual environments: benchmarks/peers/setup.sh DIRECTORY
#
# DIRECTORY/trl has TRL and Hugging Face on PyTorch, DIRECTORY/tunix has Tunix on JAX. One that is
# there with these very packages is left alone; one that is not complete is made anew.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 DIRECTORY" >&2
    exit 2
fi

make_venv() {
    local home="$1"
    shift
    local wanted="$*"
    if [ -f "$home/packages.txt" ] && [ "$(cat "$home/packages.txt")" = "$wanted" ]; then
        echo "$home: complete" >&2
        return
    fi
    rm -rf "$home"
    python3 -m venv "$home"
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    # Written last: an installation that was interrupted has none, and is made anew.
    echo "$wanted" > "$home/packages.txt"
    echo "$home: made" >&2
}

mkdir -p "$1"
make_venv "$1/trl" torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate datasets
make_venv "$1/tunix" google-tunix==0.1.7 'jax[cpu]==0.10.2' flax==0.12.8
