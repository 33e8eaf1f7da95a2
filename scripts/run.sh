#!/usr/bin/env bash
# Installs what is missing, builds, and starts the whole cluster in one process: `barid dev`.
# Arguments are handed on to it.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh run
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
# Not --release: that takes several times as long to build, and shows nothing more. Only this package, so that
# what others need is left out: jemalloc, for one, which takes half a minute to build.
cargo build --locked --package barid --bin barid
exec "${CARGO_TARGET_DIR:-target}/debug/barid" dev "$@"
