#!/usr/bin/env bash
# Puts Apache Kafka's jars, as named in scripts/kafka/pom.xml, into target/kafka/libs.
# Needs Maven and a JDK's or JRE's `java`; does nothing if the jars of this pom are there.
set -euo pipefail
cd "$(dirname "$0")/.."

libs="${CARGO_TARGET_DIR:-target}/kafka/libs"
case "$libs" in /*) ;; *) libs="$PWD/$libs" ;; esac
wanted="$(cksum <scripts/kafka/pom.xml)"

if [[ -f "$libs/.complete" && "$(cat "$libs/.complete")" == "$wanted" ]]; then
  exit 0
fi
if ! command -v mvn >/dev/null; then
  echo "kafka.sh: no mvn here; scripts/setup.sh test installs it" >&2
  exit 1
fi
echo "fetching Apache Kafka's jars from Maven Central into $libs"
rm -rf "$libs"
mvn -q -B -Dstyle.color=never -f scripts/kafka/pom.xml dependency:copy-dependencies \
  -DoutputDirectory="$libs" -DincludeScope=runtime
echo "$wanted" >"$libs/.complete"
