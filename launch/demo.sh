#!/usr/bin/env bash
# The whole loop in minutes on a laptop: cold start, GRPO, evaluation, export.
#
#   bash launch/demo.sh [--config.key=value …]     WORKDIR=runs/demo by default
#
# Run again, it continues from the last checkpoint; remove the work directory to start afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

workdir=${WORKDIR:-runs/demo}
setup requirements.txt
if [[ -d "$workdir" ]]; then
  printf 'continuing the run in %s; remove it to start afresh\n' "$workdir"
fi
python -m gtalign_jax.main --config=configs/demo_cpu.py --config.workdir="$workdir" "$@"
python -m gtalign_jax.export --workdir="$workdir" --out="$workdir/hf"
