#!/usr/bin/env bash
# A pod in miniature: N real processes on this machine that find each other over loopback.
#
#   bash launch/local_pod.sh 2 [--devices=4] [--grace=90] [--logs=DIR] [-- ARGUMENTS]
#
# ARGUMENTS go to `python -m gtalign_jax.main`, the same ones to each process; without --config the
# demo runs, in runs/local_pod. Each process has --devices virtual CPU devices. Process 0 speaks
# here, process I in DIR/process-I.log (default: runs/local_pod/processes).
# If one fails, the others have --grace seconds to end by themselves, as they do when they miss it;
# what is left is ended, and the exit status is that of the first that failed. Ctrl-C ends all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

workdir=runs/local_pod
devices=4 grace=90 logs=$workdir/processes count="" arguments=()

is_count() {
  [[ "$1" =~ ^[1-9][0-9]*$ ]]
}

while (($#)); do
  case "$1" in
    --devices=*) devices=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    -*) fail "$1: unknown option; there are --devices, --grace and --logs, and after -- the program's" ;;
    *)
      [[ -z "$count" ]] || fail "$1: the number of processes is $count already; use -- before arguments"
      count=$1
      ;;
  esac
  shift
done
is_count "$count" || fail "local_pod.sh N: N='$count', expected the number of processes, such as 2"
is_count "$devices" || fail "--devices=$devices: expected a number >= 1"
[[ "$grace" =~ ^[0-9]+$ ]] || fail "--grace=$grace: expected seconds"
if [[ " ${arguments[*]-} " != *" --config="* ]]; then
  arguments=(--config=configs/demo_cpu.py "--config.workdir=$workdir" ${arguments[@]+"${arguments[@]}"})
fi

setup requirements.txt
mkdir -p "$logs"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
export GTALIGN_COORDINATOR=127.0.0.1:$port GTALIGN_PROCESS_COUNT=$count

pids=() # of the processes that have not ended; "" in the place of one that has

alive() { # is one of ours left?
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    if [[ -n "$pid" ]] && kill -0 "$pid" 2>/dev/null; then return 0; fi
  done
  return 1
}

# shellcheck disable=SC2317,SC2329  # it is called when this script ends
signal() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    [[ -z "$pid" ]] || kill "-$1" "$pid" 2>/dev/null || true
  done
}

wait_until_gone() { # or until $1 seconds have passed
  local tenths
  for ((tenths = 0; tenths < $1 * 10; tenths++)); do
    alive || return 0
    sleep 0.1
  done
  return 0
}

# shellcheck disable=SC2317,SC2329
finish() { # leave nothing behind, whatever ended this script
  if alive; then
    signal TERM
    wait_until_gone 30 # a run saves when it is told to end
    signal KILL
  fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

printf '%s processes x %s devices on %s; logs of the others: %s\n' \
  "$count" "$devices" "$GTALIGN_COORDINATOR" "$logs"
for ((index = 0; index < count; index++)); do
  export GTALIGN_PROCESS_INDEX=$index
  if ((index == 0)); then
    python -m gtalign_jax.main "${arguments[@]}" </dev/null &
  else
    python -m gtalign_jax.main "${arguments[@]}" </dev/null >"$logs/process-$index.log" 2>&1 &
  fi
  pids+=($!)
done

failed="" left=$count
while ((left)) && [[ -z "$failed" ]]; do
  for ((index = 0; index < count; index++)); do
    pid=${pids[index]}
    if [[ -z "$pid" ]] || kill -0 "$pid" 2>/dev/null; then
      continue
    fi
    status=0
    wait "$pid" || status=$?
    pids[index]="" left=$((left - 1))
    if ((status)); then
      failed=$index
      break
    fi
  done
  sleep 0.1
done
[[ -n "$failed" ]] || exit 0

printf 'process %s ended with status %s; the others have %s s\n' "$failed" "$status" "$grace" >&2
if ((failed > 0)); then
  printf 'the end of %s:\n' "$logs/process-$failed.log" >&2
  tail -n 20 "$logs/process-$failed.log" >&2
fi
wait_until_gone "$grace"
exit "$status"
