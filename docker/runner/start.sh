#!/usr/bin/env bash
# Registers the runner at its first start, with a token that ends within an hour, then takes jobs.
set -euo pipefail
: "${REPOSITORY:?for example https://github.com/you/yours}" "${DEVICE:?for example orin-nano}"
if [ ! -f .runner ]; then
  ./config.sh --unattended --replace --url "$REPOSITORY" --token "${TOKEN:?of Settings, Actions, Runners}" \
    --name "$(hostname)" --labels "jetson,$DEVICE"
fi
unset TOKEN # no job shall see it
exec ./run.sh
