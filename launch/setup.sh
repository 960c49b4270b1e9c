# shellcheck shell=bash
# Sourced by demo.sh and test.sh: `setup requirements.txt` leaves the shell in a virtual environment
# that holds those requirements. The environment is reused while the requirement files are the same.
#
#   PYTHON   the interpreter to build it with (default: the first of python3, python3.14 … python3.11
#            that is 3.11 or newer)
#   VENV     where it lies (default: .venv in the repository)

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

find_python() {
  local name
  for name in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
    [[ -z "${PYTHON:-}" ]] || fail "PYTHON=$PYTHON is not a Python 3.11 or newer"
  done
  fail "needs Python 3.11 or newer; python3 is $(python3 --version 2>&1). Set PYTHON=/path/to/it"
}

is_installed() { # every requirement file as it was when pip last succeeded
  local file
  for file in requirements.txt "$1"; do
    cmp -s "$file" "$VENV/installed/$file" || return 1
  done
  "$VENV/bin/python" -c 'import jax' 2>/dev/null
}

has_tpu() {
  compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null
}

setup() {
  local requirements=$1 python file
  VENV=${VENV:-.venv}
  [[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
  if ! is_installed "$requirements"; then
    python=$(find_python)
    printf 'installing %s into %s with %s (some minutes)\n' "$requirements" "$VENV" "$("$python" --version)"
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
      "$python" -m venv --clear "$VENV" || fail "could not create $VENV (Debian: apt install python3-venv)"
    fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    mkdir -p "$VENV/installed"
    for file in requirements.txt "$requirements"; do
      cp "$file" "$VENV/installed/$file"
    done
  fi
  export PATH="$VENV/bin:$PATH"
  if ! has_tpu; then
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TPU_SKIP_MDS_QUERY=1
  fi
}
