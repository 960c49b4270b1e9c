#!/usr/bin/env bash
# Training on Cloud TPU virtual machines: one slice, or several joined over the data center network.
#
#   bash launch/tpu.sh run NAME --zone=us-central2-b --type=v4-32 -- \
#     --config=configs/tpu_v4.py:all --config.workdir=gs://BUCKET/NAME
#   bash launch/tpu.sh delete NAME --zone=us-central2-b
#
# `run` creates the machines, copies this source tree to every worker, installs it there, starts the
# very same command on all of them and watches until it has ended. Preempted machines are created
# again and the command continues from its checkpoint; so it does after a crash. Ending `run` does
# not end the training, and the same `run` again takes the watch up. `delete` ends what costs money.
#
#   create, wait, setup, start, watch   the single steps of `run`
#   status, logs, stop                  of what is running; `logs` follows --worker=0 of --node=0
#   resume                              delete, then run: for machines that lie broken
#
#   --zone=ZONE            required                --project=PROJECT  default: gcloud's own
#   --type=v4-8|v5e-256…   of one slice            --slices=N         default: 1
#   --spot                 cheap and preemptible   --runtime=VERSION  default: by the type
#   --create-flag=FLAG     one more for gcloud's create, as in --create-flag=--reserved
#   --env=NAME             one more variable to pass on; GTALIGN_*, OPENAI_API_KEY and HF_TOKEN are
#                          passed where they are set. They travel in a file, never on a command line
#   --restarts=3           how often a crashed run is started again on the same machines
#   --poll=60              seconds between two looks
#   --delete-after         delete the machines when the run has ended well
#   --dry-run              print the commands of a first run, execute none
#
# Needs gcloud, logged in. tests/test_launch.py has the whole of it against a stand-in for gcloud.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/machines.sh
source launch/machines.sh
# shellcheck source=launch/pack.sh
source launch/pack.sh

COMMANDS="run create wait setup start watch status logs stop resume delete"
LOST_AFTER=10 # looks in a row that reach not all workers of an active slice: it is lost

say() {
  printf '%s %s: %s\n' "$(date +%T)" "$name" "$*" >&2
}

give_up() {
  say "$*"
  exit 1
}

quote() { # $1 as one word of a command line, for any shell
  local escaped="'\\''"
  if [[ "$1" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//\'/$escaped}"
  fi
}

line() { # a command as one line that a shell reads back
  local word separator=""
  for word in "$@"; do
    printf '%s%s' "$separator" "$(quote "$word")"
    separator=" "
  done
}

execute() {
  if [[ -n "$dry_run" ]]; then
    line "$@"
    printf '\n'
  else
    "$@"
  fi
}

queued() { # gcloud compute tpus queued-resources …
  local verb=$1
  shift
  execute gcloud compute tpus queued-resources "$verb" "$@" "${where[@]}"
}

everywhere() { # one command line, on all workers of all slices at once
  queued ssh "$name" --node=all --worker=all --command="$1"
}

# ---- options

parse() {
  name="" zone="" project="" type="" slices=1 spot="" runtime="" dry_run="" delete_after="" restarts=3 poll=60
  node=0 worker=0 extra=() variables=() arguments=() rev=""
  while (($#)); do
    case "$1" in
      --zone=* | --project=* | --type=* | --slices=* | --runtime=* | --restarts=* | --poll=* | \
        --node=* | --worker=*)
        [[ -n "${1#*=}" ]] || fail "$1: needs a value"
        printf -v "$(cut -c3- <<<"${1%%=*}")" '%s' "${1#*=}"
        ;;
      --spot) spot=1 ;;
      --delete-after) delete_after=1 ;;
      --dry-run) dry_run=1 ;;
      --create-flag=*) extra+=("${1#*=}") ;;
      --env=*) variables+=("${1#*=}") ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      -*) fail "$1: unknown option; those of tpu.sh stand before --, the program's after it" ;;
      *)
        [[ -z "$name" ]] || fail "$1: a second name, after $name; the program's arguments go after --"
        name=$1
        ;;
    esac
    shift
  done
}

check() {
  local about="a lower-case letter, then letters, digits and hyphens, at most 40 in all"
  [[ "$name" =~ ^[a-z][a-z0-9-]{0,38}[a-z0-9]$ ]] || fail "NAME '$name': $about"
  [[ "$zone" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
    fail "--zone=$zone: the zone of the TPUs is required, as in --zone=us-central2-b"
  where=("--zone=$zone" --quiet)
  [[ -z "$project" ]] || where+=("--project=$project")
  [[ "$restarts" =~ ^[0-9]+$ ]] || fail "--restarts=$restarts: expected a number >= 0"
  [[ "$poll" =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--poll=$poll: expected seconds"
  is_count "$slices" || fail "--slices=$slices: expected a number >= 1"
  case "$command" in run | create | setup | start | watch | resume) check_machine ;; esac
  case "$command" in run | start | resume) check_arguments ;; esac
}

check_machine() {
  [[ -n "$type" ]] || fail "--type is required: v4-8 … v4-4096, v5e-4 …, v5p-8 …, v6e-4 …"
  machine "$type"
  runtime=${runtime:-$TPU_RUNTIME}
  workers=$((TPU_HOSTS * slices))
}

check_arguments() {
  local argument config="" workdir="" devices=""
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case "$argument" in
      --config=*) config=$argument ;;
      --config.workdir=*) workdir=${argument#*=} ;;
      --config.pod.device_count=*) devices=$argument ;;
    esac
  done
  [[ -n "$config" ]] || fail "needs the program's arguments: -- --config=configs/tpu_v4.py:all …"
  if [[ "$workdir" != gs://?* && "$workdir" != /* && (-n "$spot" || "$workers" -gt 1) ]]; then
    fail "--config.workdir=$workdir: would lie on each worker's own disk, which the others do not" \
      "see and a preempted machine loses; give --config.workdir=gs://BUCKET/DIRECTORY"
  fi
  # A slice that is missing is then an error at start, not a slow run.
  [[ -n "$devices" ]] || arguments+=("--config.pod.device_count=$((TPU_CHIPS * slices))")
}

# ---- the machines

state() { # of the queued resource; NONE if there is none, UNKNOWN if nobody could say
  local text
  if text=$(queued describe "$name" '--format=value(state.state)' 2>&1); then
    tail -n 1 <<<"$text"
  elif [[ "$text" == *NOT_FOUND* || "$text" == *"not found"* ]]; then
    echo NONE
  else
    say "cannot look: $(tail -n 1 <<<"$text")"
    echo UNKNOWN
  fi
}

create() {
  local flags=("--accelerator-type=$TPU_TYPE" "--runtime-version=$runtime")
  if ((slices > 1)); then
    flags+=("--node-count=$slices" "--node-prefix=$name")
  else
    flags+=("--node-id=$name")
  fi
  [[ -z "$spot" ]] || flags+=(--spot)
  queued create "$name" "${flags[@]}" ${extra[@]+"${extra[@]}"}
}

delete() {
  queued delete "$name" --force
}

ensure() { # create, unless it is there; what has been preempted makes room first
  if [[ -n "$dry_run" ]]; then
    create
    return
  fi
  case "$(state)" in
    NONE) create ;;
    SUSPENDED) delete && create ;;
    UNKNOWN) return 1 ;;
    *) say "is there already" ;;
  esac
}

wait_active() { # 0: active; 1: preempted before it was
  local now before=""
  if [[ -n "$dry_run" ]]; then
    queued describe "$name" '--format=value(state.state)'
    return
  fi
  while true; do
    now=$(state)
    [[ "$now" == "$before" ]] || say "$now"
    before=$now
    case "$now" in
      ACTIVE) return 0 ;;
      SUSPENDED) return 1 ;;
      NONE) give_up "does not exist; create it first" ;;
      FAILED)
        queued describe "$name" >&2 || true
        give_up "could not be created; gcloud's reason stands above. After mending it: delete," \
          "then run"
        ;;
    esac
    sleep "$poll"
  done
}

# ---- what runs on them

setup_workers() { # copies and installs; 1 if a worker did not get there
  local answers copied=1 box=runs/launch/$name
  if [[ -z "$rev" ]]; then # once: what is edited during a `run` does not slip in after a preemption
    rev=$(revision)
    pack "$box" || give_up "cannot pack the source tree"
  fi
  if [[ -z "$dry_run" ]]; then
    trap 'rm -f "runs/launch/$name/gtalign-env"' EXIT
    (umask 077 && write_env ${variables[@]+"${variables[@]}"} >"$box/gtalign-env") || exit 2
    # gcloud refuses several workers while an ssh agent runs that does not have its key.
    if [[ -f ~/.ssh/google_compute_engine ]] && ssh-add -l >/dev/null 2>&1; then
      ssh-add -q ~/.ssh/google_compute_engine || true
    fi
  fi
  queued scp "$box/gtalign.tar.gz" "$box/gtalign-env" "$name:" --node=all --worker=all || copied=""
  rm -f "$box/gtalign-env"
  [[ -n "$copied" ]] || return 1
  answers=$(everywhere "mkdir -p gtalign/source-$rev && tar -xzf gtalign.tar.gz -C gtalign/source-$rev\
 && bash gtalign/source-$rev/launch/worker.sh setup") || { printf '%s\n' "$answers" >&2 && return 1; }
  heard "ready $rev" "$answers"
}

start() { # the very same command on every worker
  local answers
  rev=${rev:-$(revision)}
  answers=$(everywhere "bash gtalign/source-$rev/launch/worker.sh start $(line "${arguments[@]}")") ||
    { printf '%s\n' "$answers" >&2 && return 1; }
  heard "started $rev" "$answers"
}

heard() { # did every worker say $1? gcloud ends well even if a whole slice could not be reached
  local count
  if [[ -n "$dry_run" ]]; then
    printf '%s\n' "$2"
    return
  fi
  count=$(grep -c "^gtalign: [^ ]* $1\$" <<<"$2") || true
  say "$count of $workers workers: $1"
  if ((count != workers)); then
    printf '%s\n' "$2" >&2
    return 1
  fi
}

watch() { # until it has ended; sets outcome: done, wrong, told, stopped, crashed, preempted, deleted
  local answers missed=0 answered
  if [[ -n "$dry_run" ]]; then
    everywhere "bash gtalign/source/launch/worker.sh status"
    outcome="done"
    return
  fi
  while true; do
    case "$(state)" in
      SUSPENDING | SUSPENDED | FAILED) outcome=preempted && return ;;
      NONE | DELETING) outcome=deleted && return ;;
      ACTIVE)
        answers=$(everywhere "bash gtalign/source/launch/worker.sh status" 2>/dev/null |
          grep '^gtalign: ') || true
        answered=$(grep -c . <<<"$answers") || true
        if ((answered != workers)); then
          missed=$((missed + 1))
          say "$answered of $workers workers answered"
          if ((missed >= LOST_AFTER)); then outcome=preempted && return; fi
        else
          missed=0
          ended "$answers" && return
        fi
        ;;
    esac
    sleep "$poll"
  done
}

ended() { # has it, on all workers? Then outcome is set
  local states
  states=$(sed -E 's/^gtalign: [^ ]+ ([a-z]+( [0-9]+)?) .*/\1/' <<<"$1" | LC_ALL=C sort | uniq -c)
  say "$(sed -E 's/^ *([0-9]+) (.*)/\1 \2/' <<<"$states" | paste -s -d , -)" \
    "|$(head -n 1 <<<"$1" | cut -d'|' -f3)"
  if grep -q running <<<"$states"; then return 1; fi
  if grep -q stopped <<<"$states"; then
    outcome=stopped
  elif grep -q 'exit 2$' <<<"$states"; then
    outcome=wrong
  elif ! grep -qvE 'exit 75$' <<<"$states"; then
    outcome=told
  elif grep -qvE 'exit 0$' <<<"$states"; then
    outcome=crashed
  else
    outcome="done"
  fi
}

again() { # something did not work: wait, but not for ever
  tries=$((tries + 1))
  ((tries <= 5)) || give_up "$1, five times in a row; see above"
  say "$1; again in $poll s"
  sleep "$poll"
}

run() {
  local tries=0 crashes=0
  while true; do
    ensure || { again "not created" && continue; }
    wait_active || continue
    { setup_workers && start; } || { again "not all workers are set up" && continue; }
    tries=0
    watch
    case "$outcome" in
      done) break ;;
      deleted) give_up "was deleted meanwhile" ;;
      wrong) give_up "the program refused its arguments; see: tpu.sh logs $name --zone=$zone" ;;
      preempted)
        say "preempted; asking for the same again"
        [[ "$(state)" == NONE ]] || delete || true
        ;;
      stopped) give_up "was stopped; the same command goes on from its checkpoint" ;;
      told)
        say "told to end, and saved; starting it again in $poll s"
        sleep "$poll"
        ;;
      crashed)
        crashes=$((crashes + 1))
        ((crashes <= restarts)) ||
          give_up "crashed $crashes times; see: tpu.sh logs $name --zone=$zone"
        say "crashed; starting it again ($crashes of $restarts)"
        ;;
    esac
  done
  if [[ -n "$delete_after" ]]; then
    delete
  elif [[ -z "$dry_run" ]]; then
    say "the run has ended well; the machines cost money until: bash launch/tpu.sh delete $name" \
      "--zone=$zone${project:+ --project=$project}"
  fi
}

main() {
  command=${1:-}
  [[ -n "$command" && " $COMMANDS " == *" $command "* ]] ||
    fail "tpu.sh COMMAND NAME --zone=ZONE …: COMMAND '$command' is none of: $COMMANDS"
  shift
  parse "$@"
  check
  [[ -n "$dry_run" ]] || command -v gcloud >/dev/null ||
    fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install (--dry-run needs none)"
  case "$command" in
    run | create | delete | start) "$command" ;;
    watch)
      watch
      say "$outcome"
      [[ "$outcome" == "done" ]]
      ;;
    wait) wait_active ;;
    setup) setup_workers ;;
    resume) delete && run ;;
    status) queued describe "$name" '--format=value(state.state)' &&
      everywhere "bash gtalign/source/launch/worker.sh status" ;;
    stop) everywhere "bash gtalign/source/launch/worker.sh stop" ;;
    logs) queued ssh "$name" "--node=$node" "--worker=$worker" \
      --command="bash gtalign/source/launch/worker.sh logs" ;;
  esac
}

main "$@"
