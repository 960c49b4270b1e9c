#!/usr/bin/env bash
# A headless Chromium for the tests that open reports in a browser: bash launch/browser.sh
#
# Does nothing where there is one: $CHROMIUM, or chromium, chromium-browser, google-chrome on PATH.
# Else installs Debian's or Ubuntu's package, which only root may do.
set -euo pipefail

for name in ${CHROMIUM:+"$CHROMIUM"} chromium chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" >/dev/null; then
    printf 'browser: %s\n' "$(command -v "$name")"
    exit 0
  fi
done

if ! command -v apt-get >/dev/null; then
  printf 'error: no Chromium found, and no apt-get to install one: set CHROMIUM=/path/to/it\n' >&2
  exit 1
fi
if [[ "$(id -u)" != 0 ]]; then
  printf 'error: no Chromium found: sudo apt-get install chromium, or set CHROMIUM=/path/to/it\n' >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet
apt-get install --quiet --yes --no-install-recommends chromium
