#!/usr/bin/env bash
# Installs what is missing, builds what is deployed, and measures it: bench.sh SCENARIO [OPTION...],
# as `barid-loadtest --help` lists them.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh test
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
cargo build --locked --release --workspace --bins
exec "${CARGO_TARGET_DIR:-target}/release/barid-loadtest" "$@"
