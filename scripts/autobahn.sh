#!/usr/bin/env bash
# Runs Autobahn's fuzzing client (WebSocket conformance) against the echo example of access, which is
# the socket code that serves devices. Fails if a case is neither OK nor NON-STRICT nor INFORMATIONAL.
#   autobahn.sh [CASE…]     such as '6.*'; all by default
# Left out are the cases 12 and 13, permessage-deflate, which is refused (docs/protocol.md). Frames may
# have 17 MiB here: the cases 9 measure up to 16.
# The suite runs on CPython 2.7 only: PYTHON27, or the one on the PATH, or pyenv's.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh run
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
suite=autobahntestsuite==25.10.1
dir="$PWD/${CARGO_TARGET_DIR:-target}/autobahn"
cases=("${@:-*}")

python27() {
  local python
  for python in "${PYTHON27:-}" python2.7 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/2.7*/bin/python2.7; do
    if [[ -n "$python" ]] && "$python" -c 'import ctypes, ssl, zlib' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  echo "autobahn: no CPython 2.7 here; 'pyenv install 2.7.18' builds one, or name one in PYTHON27" >&2
  exit 1
}

install_suite() {
  [[ "$(cat "$dir/.complete" 2>/dev/null)" == "$suite" ]] && return
  local python
  python="$(python27)"
  echo "installing $suite into $dir"
  rm -rf "$dir"
  mkdir -p "$dir"
  python3 -m venv "$dir/tool"
  # The last one that makes environments of Python 2.
  "$dir/tool/bin/pip" install -q --disable-pip-version-check 'virtualenv<20.22'
  "$dir/tool/bin/virtualenv" -q -p "$python" "$dir/env"
  "$dir/env/bin/pip" install -q --disable-pip-version-check "$suite"
  echo "$suite" >"$dir/.complete"
}

install_suite
cargo build --locked --workspace --example echo
exec 3< <(exec "${CARGO_TARGET_DIR:-target}/debug/examples/echo" 127.0.0.1:0 $((17 << 20)))
echo_pid=$!
trap 'kill "$echo_pid"' EXIT
read -r url <&3

printf -v list '"%s",' "${cases[@]}"
rm -rf "$dir/report"
cat >"$dir/spec.json" <<SPEC
{"outdir": "$dir/report", "servers": [{"agent": "barid-access", "url": "$url"}],
 "cases": [${list%,}], "exclude-cases": ["12.*", "13.*"], "exclude-agent-cases": {}}
SPEC
# It writes its database of other modes' results where it stands.
(cd "$dir" && env/bin/wstest --mode fuzzingclient --spec spec.json >wstest.log 2>&1) || {
  tail -n 20 "$dir/wstest.log" >&2
  exit 1
}
python3 - "$dir/report/index.json" <<'PYTHON'
import collections, json, sys
cases = json.load(open(sys.argv[1]))["barid-access"]
good = {"OK", "NON-STRICT", "INFORMATIONAL"}
failed = 0
for case in sorted(cases, key=lambda id: [int(part) for part in id.split(".")]):
    results = (cases[case]["behavior"], cases[case]["behaviorClose"])
    if not good.issuperset(results):
        failed += 1
        print("%-8s %s, closing: %s" % ((case,) + results))
count = collections.Counter(case["behavior"] for case in cases.values())
print(", ".join("%d %s" % (number, result) for result, number in count.most_common()))
print("%d passed, %d failed" % (len(cases) - failed, failed))
sys.exit(failed > 0 or not cases)
PYTHON
echo "the whole report: $dir/report/index.html"
