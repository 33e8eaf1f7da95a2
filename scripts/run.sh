#!/usr/bin/env bash
# Installs what is missing, builds, and starts the whole cluster in one process: `barid dev`.
# Arguments are handed on to it.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh run
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
# Not --release: that takes several times as long to build, and shows nothing more. With one test, so
# that dependencies have the features that they have in test.sh, and are built once for both.
cargo build --locked --workspace --bin barid --test dev
exec "${CARGO_TARGET_DIR:-target}/debug/barid" dev "$@"
