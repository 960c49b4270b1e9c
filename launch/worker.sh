#!/usr/bin/env bash
# One worker of a TPU slice: tpu.sh copies the source tree there and calls this over ssh.
#
#   worker.sh setup            install, say "ready REVISION"
#   worker.sh start ARGUMENTS  train in the background; a dropped connection does not end it
#   worker.sh status|logs|stop
#
# Everything lies in one folder: source-REVISION/ (this tree), source -> the newest, venv/, env (the
# variables, for their owner's eyes only), log, command, exit (the last run's status) and lock, which
# is held for as long as the run or any process that it left behind lives.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
base=$(dirname "$root")
revision=${root##*/source-}
cd "$root"
# shellcheck source=launch/setup.sh
source launch/setup.sh

UV=uv==0.13.9 PYTHON_VERSION=3.12
export VENV=$base/venv

say() {
  printf 'gtalign: %s %s\n' "$(uname -n)" "$*"
}

is_running() { # a shared lock: those who look do not get into each other's way
  ! flock --shared --nonblock "$base/lock" true
}

# Cloud TPU's images come with Python 3.10. uv brings a newer one of its own: without root, and
# without waiting for apt, whose lock a fresh machine holds while it updates itself.
install_python() {
  export UV_PYTHON_INSTALL_DIR=$base/python
  local uv=$base/uv/bin/uv
  python3 -m pip install --quiet --disable-pip-version-check --upgrade --target "$base/uv" "$UV" &&
    "$uv" python install --quiet "$PYTHON_VERSION" &&
    "$uv" python find --managed-python "$PYTHON_VERSION"
}

setup_worker() {
  chmod 700 "$base"
  if is_running; then
    [[ "$(readlink "$base/source")" == "source-$revision" ]] ||
      fail "$(uname -n) is training with another revision, $(readlink "$base/source"): stop it first"
  else
    if ! PYTHON=$(find_python 2>/dev/null); then
      PYTHON=$(install_python)
    fi
    export PYTHON
    setup requirements-tpu.txt
    ln -sfn "source-$revision" "$base/source"
  fi
  say "ready $revision"
}

start() {
  local try
  if [[ -e "$HOME/gtalign-env" ]]; then
    chmod 600 "$HOME/gtalign-env"
    mv -f "$HOME/gtalign-env" "$base/env"
  fi
  if is_running; then
    [[ "$(cat "$base/command")" == "$(printf '%q ' "$revision" "$@")" ]] ||
      fail "$(uname -n) is running another command: $(cat "$base/command"); stop it first"
  else
    [[ "$(readlink "$base/source")" == "source-$revision" ]] ||
      fail "$(uname -n) is not set up with revision $revision"
    rm -f "$base/exit" "$base/stopped"
    printf '%q ' "$revision" "$@" >"$base/command"
    setsid nohup bash "$root/launch/worker.sh" train "$@" >>"$base/log" 2>&1 </dev/null &
    for try in {1..100}; do
      is_running || [[ -e "$base/exit" ]] && break
      ((try < 100)) || fail "$(uname -n): the run did not begin; see $base/log"
      sleep 0.1
    done
  fi
  say "started $revision"
}

train() { # in a session of its own; every process that it starts inherits the lock
  local code=0
  exec 9>"$base/lock"
  flock --timeout 10 9 || fail "another run holds $base/lock" # one who looks holds it for an instant
  echo $$ >"$base/pid"
  if [[ -e "$base/env" ]]; then
    # shellcheck disable=SC1091
    source "$base/env"
  fi
  setup requirements-tpu.txt
  printf '\n== %s: revision %s: %s\n' "$(date -u +%FT%TZ)" "$revision" "$*"
  trap : TERM # the program may save and end; the shell waits for it, to write its status down
  python -m gtalign_jax.main "$@" || code=$?
  echo "$code" >"$base/exit.new"
  mv "$base/exit.new" "$base/exit"
  printf '== %s: ended with status %s\n' "$(date -u +%FT%TZ)" "$code"
}

status() {
  local what=none last=""
  if is_running; then
    what=running
  elif [[ -e "$base/stopped" ]]; then
    what="stopped $(cat "$base/exit" 2>/dev/null || true)"
  elif [[ -e "$base/exit" ]]; then
    what="exit $(cat "$base/exit")"
  fi
  if [[ -e "$base/log" ]]; then
    last=$(tail -n 50 "$base/log" | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c1-150) || true
  fi
  say "$what | $revision | $last"
}

stop() {
  local pid waited
  if is_running; then
    touch "$base/stopped" # its status, 75, would read as if the machine had told it to end
    pid=$(cat "$base/pid")
    kill -TERM -- "-$pid" 2>/dev/null || true
    for ((waited = 0; waited < ${STOP_SECONDS:-120}; waited++)); do
      is_running || break
      sleep 1
    done
    if is_running; then
      kill -KILL -- "-$pid" 2>/dev/null || true
      echo 137 >"$base/exit"
    fi
  fi
  say "stopped"
}

case "${1:-}" in
  setup) setup_worker ;;
  start | train | status | stop)
    command=$1
    shift
    "$command" "$@"
    ;;
  logs) exec tail -n 200 -F "$base/log" ;;
  *) fail "worker.sh setup|start|status|logs|stop, not '${1:-}'" ;;
esac
