#!/usr/bin/env bash
# Chromium for the tests of the web UI, on a Debian or Ubuntu machine where it is missing. Needs root there.
set -euo pipefail
if command -v chromium > /dev/null; then exit 0; fi
for try in 1 2 3; do
  if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; then
    exit 0
  fi
  echo "apt-get failed (try $try of 3)" >&2
  sleep 5
done
exit 1
