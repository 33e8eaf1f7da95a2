#!/usr/bin/env bash
# Drives a cluster through the stranger's scenarios (tests/stranger), after installing what is missing and
# building the binaries.
#   stranger.sh                          all scenarios
#   stranger.sh --short                  the part that scripts/test.sh runs
#   stranger.sh --only NAME --seed N     one of those that --list names
#   stranger.sh --built …                the same with the binaries that are there
set -euo pipefail
cd "$(dirname "$0")/.."

target="${CARGO_TARGET_DIR:-target}"
if [[ "${1:-}" == --built ]]; then
  shift
elif [[ " $* " == *" --list "* || " $* " == *" --help "* ]]; then
  scripts/setup.sh test
else
  scripts/setup.sh test
  export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
  cargo build --locked --workspace --bins
fi
scripts/python.sh tests/stranger/requirements.txt "$target/stranger-python"
export PYTHONPATH=tests/stranger PYTHONDONTWRITEBYTECODE=1
exec "$target/stranger-python/bin/python" -m stranger "$@"
