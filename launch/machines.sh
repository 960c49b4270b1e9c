# shellcheck shell=bash
# shellcheck disable=SC2034  # the variables are for the script that sources this
# Sourced by tpu.sh and gke.sh: `machine v5e-256` sets what the two need to know of one slice.
#
#   TPU_TYPE        its name for Cloud TPU       TPU_RUNTIME     the image of its virtual machines
#   TPU_CHIPS       chips of one slice           TPU_HOSTS       machines of one slice
#   TPU_TOPOLOGY    4x4x4                        TPU_ACCELERATOR GKE's label of the chip
#
# v4 and v5p count TensorCores, two on each chip; v5e (Cloud TPU calls it v5litepod) and v6e count
# chips. A machine has four chips, but a v5e or v6e slice of one or eight chips is one machine.

TORUS_SIZES="8:2x2x1 16:2x2x2 32:2x2x4 64:2x4x4 128:4x4x4 256:4x4x8 384:4x4x12 512:4x8x8
  1024:8x8x8 1536:8x8x12 2048:8x8x16 4096:8x16x16"
V5P_SIZES="$TORUS_SIZES 8192:16x16x16 12288:16x16x24"
PLANE_SIZES="1:1x1 4:2x2 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16"

machine() {
  local wanted=$1 kind=${1%-*} size=${1##*-} sizes entry cores=1
  case "$kind" in
    v4) sizes=$TORUS_SIZES cores=2 TPU_RUNTIME=tpu-ubuntu2204-base TPU_ACCELERATOR=tpu-v4-podslice ;;
    v5p) sizes=$V5P_SIZES cores=2 TPU_RUNTIME=v2-alpha-tpuv5 TPU_ACCELERATOR=tpu-v5p-slice ;;
    v5e | v5litepod)
      kind=v5litepod sizes=$PLANE_SIZES
      TPU_RUNTIME=v2-alpha-tpuv5-lite TPU_ACCELERATOR=tpu-v5-lite-podslice
      ;;
    v6e) sizes=$PLANE_SIZES TPU_RUNTIME=v2-alpha-tpuv6e TPU_ACCELERATOR=tpu-v6e-slice ;;
    *) fail "--type=$wanted: the kinds are v4, v5e, v5p and v6e, as in v4-32 or v5e-256" ;;
  esac
  TPU_TOPOLOGY=""
  for entry in $sizes; do
    if [[ "${entry%%:*}" == "$size" ]]; then
      TPU_TOPOLOGY=${entry#*:}
    fi
  done
  if [[ -z "$TPU_TOPOLOGY" ]]; then
    # shellcheck disable=SC2046,SC2086  # one word for each size
    fail "--type=$wanted: there are$(printf " ${1%-*}-%s" $(printf '%s\n' $sizes | cut -d: -f1))"
  fi
  TPU_TYPE=$kind-$size
  TPU_CHIPS=$((size / cores))
  if ((TPU_CHIPS == 1 || (TPU_CHIPS == 8 && cores == 1))); then
    TPU_HOSTS=1
  else
    TPU_HOSTS=$((TPU_CHIPS / 4))
  fi
}

is_count() { # is this a whole number >= 1?
  [[ "$1" =~ ^[1-9][0-9]*$ ]]
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}
