#!/usr/bin/env bash
# Lint and all tests, in a virtual environment of their own: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

setup requirements-test.txt
ruff check .
python -m pytest -n "${TEST_WORKERS:-2}" "$@"
