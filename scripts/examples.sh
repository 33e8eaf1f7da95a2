#!/usr/bin/env bash
# Installs the packages of docs/examples/node and builds docs/examples/go, into target/examples; quick when
# nothing has changed. Both as locked there; the caches of npm and Go are the user's own.
set -euo pipefail
cd "$(dirname "$0")/.."

into="${CARGO_TARGET_DIR:-target}/examples"
case "$into" in /*) ;; *) into="$PWD/$into" ;; esac
mkdir -p "$into/node"
# Two calls at once would install over each other.
exec 9>"$into/.lock"
flock 9

wanted="$(cat docs/examples/node/package*.json | cksum)"
if [[ ! -f "$into/node/.complete" || "$(cat "$into/node/.complete")" != "$wanted" ]]; then
  echo "installing the packages of docs/examples/node into $into/node"
  rm -f "$into/node/.complete"
  cp docs/examples/node/package.json docs/examples/node/package-lock.json "$into/node"
  (cd "$into/node" && npm ci --no-audit --no-fund --no-update-notifier --loglevel=error)
  echo "$wanted" >"$into/node/.complete"
fi
# Go does nothing if its cache has it.
(cd docs/examples/go && go build -o "$into/go/push_and_receive" .)
