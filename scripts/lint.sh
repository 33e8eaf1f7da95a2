#!/usr/bin/env bash
# Format and lints. What is a matter of taste is decided by these programs.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh lint
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
if command -v rustup >/dev/null; then
  rustup component list --installed | grep -q '^clippy' || rustup component add clippy
  rustup component list --installed | grep -q '^rustfmt' || rustup component add rustfmt
fi
cargo fmt --all --check
cargo clippy --locked --workspace --all-targets -- -D warnings
# No circle of imports of more than two files, in any crate.
python3 scripts/imports.py --check
if command -v shellcheck >/dev/null; then
  shellcheck scripts/*.sh .ci/run
fi
# Vulnerable dependencies, licences, sources. cargo-deny, where it is installed, has newer advisories.
python3 -m doctest scripts/dependencies.py
python3 scripts/dependencies.py
if command -v cargo-deny >/dev/null; then
  cargo deny check
fi
