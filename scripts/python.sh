#!/usr/bin/env bash
# Puts Python packages into a virtual environment; does nothing if those of this list are there.
#   python.sh [LIST DIRECTORY]     default: docs/examples/python/requirements.txt, target/python
set -euo pipefail
cd "$(dirname "$0")/.."

list="${1:-docs/examples/python/requirements.txt}"
env="${2:-${CARGO_TARGET_DIR:-target}/python}"
wanted="$(cksum <"$list")"
mkdir -p "$(dirname "$env")"
# Two calls at once would install over each other.
exec 9>"$env.lock"
flock 9

if [[ -f "$env/.complete" && "$(cat "$env/.complete")" == "$wanted" ]]; then
  exit 0
fi
echo "installing $list into $env"
rm -rf "$env"
python3 -m venv "$env"
"$env/bin/pip" install -q --disable-pip-version-check -r "$list"
echo "$wanted" >"$env/.complete"
