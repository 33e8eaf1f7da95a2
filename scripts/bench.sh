#!/usr/bin/env bash
# Installs dependencies, builds the release binaries and runs the load tool: bench.sh COMMAND [OPTION...];
# `barid-loadtest --help` lists the commands.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh test
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
cargo build --locked --release --workspace --bins
exec "${CARGO_TARGET_DIR:-target}/release/barid-loadtest" "$@"
