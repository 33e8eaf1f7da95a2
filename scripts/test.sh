#!/usr/bin/env bash
# Installs what is missing and runs every test: unit, property, contract, end-to-end.
# With arguments, which are handed on to `cargo test`, it runs those tests only.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh test
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
# The end-to-end tests start the roles' binaries, which Cargo builds for a package's own tests only.
# --tests beside --bins: both are then built with the same features, once.
cargo build --locked --workspace --bins --tests
# A test that hangs is an error that names it (as running for over 60 seconds), not a job without end.
status=0
if (($# > 0)); then
  timeout --foreground 30m cargo test --locked --workspace --no-fail-fast "$@" || status=$?
else
  scripts/run_tests.py || status=$?
  cargo test --locked --workspace --doc --quiet || status=$?
  # The stranger's suite, in its short form: also when a test before it failed.
  scripts/stranger.sh --built --short --jobs 2 --quiet || status=$?
fi
exit "$status"
