#!/usr/bin/env bash
# A run on Google Kubernetes Engine: launch/jobset.yaml filled in, for kubectl.
#
#   kubectl create secret generic gtalign-env --from-env-file=FILE     # GTALIGN_JUDGE_URL=… and so on
#   bash launch/gke.sh apply NAME --type=v5e-256 --image=IMAGE [--slices=2] [--spot] -- \
#     --config=configs/tpu_v4.py:all --config.workdir=gs://BUCKET/NAME
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME
#   bash launch/gke.sh delete NAME
#
#   render           print the manifest and do no more (apply --dry-run is the same)
#   --restarts=10    how often all slices begin again after a failure (--spot: 100)
#
# IMAGE is what launch/Dockerfile builds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/machines.sh
source launch/machines.sh

yaml_string() { # $1 as a double-quoted YAML scalar
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

fill() { # the template, line by line
  local text key indent argument
  while IFS= read -r text; do
    case "$text" in
      \#*) continue ;;
      *'# spot') [[ -n "$spot" ]] || continue ;;
    esac
    # shellcheck disable=SC2016  # ${…} is what stands in the template
    case "$text" in
      *'- ${ARGUMENTS}')
        indent=${text%%-*}
        for argument in "${arguments[@]}"; do
          printf '%s- %s\n' "$indent" "$(yaml_string "$argument")"
        done
        continue
        ;;
    esac
    for key in NAME RESTARTS SLICES HOSTS ACCELERATOR TOPOLOGY IMAGE CHIPS_PER_HOST; do
      text=${text//\$\{$key\}/${!key}}
    done
    printf '%s\n' "$text"
  done <launch/jobset.yaml
}

NAME="" SLICES=1 RESTARTS="" IMAGE="" spot="" type="" dry_run="" arguments=()
command=${1:-}
case "$command" in
  render | apply | delete) shift ;;
  *) fail "gke.sh COMMAND NAME …: COMMAND '$command' is none of: render apply delete" ;;
esac
while (($#)); do
  case "$1" in
    --type=*) type=${1#*=} ;;
    --image=*) IMAGE=${1#*=} ;;
    --slices=*) SLICES=${1#*=} ;;
    --restarts=*) RESTARTS=${1#*=} ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    -*) fail "$1: unknown option; those of gke.sh stand before --, the program's after it" ;;
    *)
      [[ -z "$NAME" ]] || fail "$1: a second name, after $NAME; the program's arguments go after --"
      NAME=$1
      ;;
  esac
  shift
done
[[ "$NAME" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  fail "NAME '$NAME': a lower-case letter, then letters, digits and hyphens, at most 40 in all"
if [[ "$command" == delete ]]; then
  if [[ -n "$dry_run" ]]; then
    echo "kubectl delete jobset $NAME"
    exit
  fi
  exec kubectl delete jobset "$NAME"
fi
is_count "$SLICES" || fail "--slices=$SLICES: expected a number >= 1"
RESTARTS=${RESTARTS:-$((${spot:-0} ? 100 : 10))}
[[ "$RESTARTS" =~ ^[0-9]+$ ]] || fail "--restarts=$RESTARTS: expected a number >= 0"
[[ -n "$type" ]] || fail "--type is required, as in --type=v5e-256"
[[ "$IMAGE" =~ ^[A-Za-z0-9./_:@-]+$ ]] || fail "--image=$IMAGE: expected the name of an image"
machine "$type"
# shellcheck disable=SC2034  # `fill` reads them
HOSTS=$TPU_HOSTS CHIPS_PER_HOST=$((TPU_CHIPS / TPU_HOSTS))
# shellcheck disable=SC2034
ACCELERATOR=$TPU_ACCELERATOR TOPOLOGY=$TPU_TOPOLOGY
if ((SLICES > 1 && HOSTS == 1)); then
  fail "--slices=$SLICES --type=$type: GKE joins slices of two or more machines only"
fi
[[ " ${arguments[*]-} " == *" --config="* ]] || fail "needs the program's arguments: -- --config=…"
[[ " ${arguments[*]} " =~ " --config.workdir="(gs:/)?/ ]] ||
  fail "--config.workdir must be gs://BUCKET/DIRECTORY or a mounted directory: a pod's disk is lost"
if [[ " ${arguments[*]} " != *" --config.pod.device_count="* ]]; then
  arguments+=("--config.pod.device_count=$((TPU_CHIPS * SLICES))")
fi

if [[ "$command" == render || -n "$dry_run" ]]; then
  fill
else
  fill | kubectl apply -f -
fi
