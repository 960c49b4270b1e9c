#!/usr/bin/env bash
# Keeps a run going on one machine: runs a command again until it has ended well.
#
#   bash launch/keep.sh [--restarts=5] [--pause=10] python -m gtalign_jax.main --config=…
#
# What its status means:  0 done, 2 a mistake in its arguments, 130 ended by hand: they end this too
#                         75 told to end, and saved: again at once
#                         anything else: again after --pause seconds, twice as many each time
# The latter ends after --restarts=N failures in a row; a command that ran longer than --well=600
# seconds was on its way, and the count begins anew. SIGTERM and Ctrl-C are passed on, and the
# command's status is this script's.
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

restarts=5 pause=10 well=600
while (($#)); do
  case "$1" in
    --restarts=* | --pause=* | --well=*)
      [[ "${1#*=}" =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "$1: expected a whole number >= 0"
      printf -v "$(cut -c3- <<<"${1%%=*}")" '%s' "${1#*=}"
      ;;
    --)
      shift
      break
      ;;
    -*) fail "$1: unknown option; there are --restarts, --pause and --well, then the command" ;;
    *) break ;;
  esac
  shift
done
(($#)) || fail "keep.sh [--restarts=N] [--pause=SECONDS] [--well=SECONDS] COMMAND …"

child="" told=""

# shellcheck disable=SC2317,SC2329  # the traps call it
pass_on() {
  told=$1
  [[ -z "$child" ]] || kill "-$1" "$child" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

wait_for_child() { # sets status; a signal ends bash's `wait`, not the child
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
}

failures=0
while true; do
  began=$SECONDS
  # In a process group of its own Ctrl-C reaches it once, by `pass_on`; and SIGINT is not ignored
  # there, as it is by what a script without job control puts in the background.
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  [[ -z "$told" ]] || kill "-$told" "$child" 2>/dev/null || true
  wait_for_child
  child=""
  ran=$((SECONDS - began))
  if [[ -n "$told" ]] || ((status == 0 || status == 2 || status == 130)); then
    exit "$status"
  fi
  if ((status == 75)); then
    printf 'keep.sh: told to end, and saved; starting again\n' >&2
    continue
  fi
  ((ran < well)) || failures=0
  failures=$((failures + 1))
  if ((failures > restarts)); then
    printf 'keep.sh: status %s; %s failures in a row, more than --restarts=%s\n' \
      "$status" "$failures" "$restarts" >&2
    exit "$status"
  fi
  seconds=$((pause << (failures < 7 ? failures - 1 : 6)))
  printf 'keep.sh: status %s after %s s; starting again (%s of %s) in %s s\n' \
    "$status" "$ran" "$failures" "$restarts" "$seconds" >&2
  ended=$status
  sleep "$seconds" &
  child=$!
  wait_for_child
  child=""
  [[ -z "$told" ]] || exit "$ended"
done
