#!/usr/bin/env bash
# Installs what the tests of pages need: Debian's Chromium and its driver. Elsewhere it says what is missing.
#
#   bash tools/install_browser.sh
set -euo pipefail

missing=()
for program in chromium chromedriver; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if ((!${#missing[@]})); then exit; fi

if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "no ${missing[*]} on the PATH, and apt-get cannot be used here (no root, or no Debian): pages are not tested." >&2
    echo "Remedy: on Debian, apt-get install chromium chromium-driver; elsewhere, Chromium and the chromedriver for it." >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null
