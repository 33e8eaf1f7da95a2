#!/usr/bin/env bash
# Installs what this machine lacks, and nothing else.
#   setup.sh run     what building and running Barid takes
#   setup.sh lint    that, and what the lints take (Python)
#   setup.sh test    what building and running takes, and the tests (Java, Maven, Apache Kafka's jars, and what the
#                    examples take: Python, Node and Go with their packages, Chromium)
# Debian packages are installed with apt by root, or through sudo where that asks for no password;
# otherwise they are named, and nothing is touched. Quick when nothing is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
purpose="${1:-run}"

# Where rustup puts cargo; a shell that started before it was installed does not know.
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
# What Barid is developed with, so that lints say here what they said there. Any from rust-version
# in Cargo.toml on will do and is left alone.
rust_installed=1.95.0
rust_needed="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)"

missing=()
need() { # need PACKAGE COMMAND: the Debian package that brings a command that is not here
  command -v "$2" >/dev/null || missing+=("$1")
}

rust_is_new_enough() {
  local have
  have="$(cargo --version 2>/dev/null | cut -d' ' -f2)" || return 1
  [[ -n "$have" && "$(printf '%s\n' "$rust_needed" "$have" | sort -V | head -n1)" == "$rust_needed" ]]
}

list_missing() {
  need gcc cc
  need g++ c++ # librdkafka's configure asks for one
  need make make
  need pkg-config pkg-config # finds OpenSSL
  [[ -e /usr/include/openssl/ssl.h ]] || missing+=(libssl-dev)
  need redis-server redis-server
  [[ -e /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates)
  rust_is_new_enough || need curl curl
  if [[ "$purpose" == lint ]]; then need python3 python3; fi
  if [[ "$purpose" == test ]]; then
    need default-jre-headless java
    need maven mvn
    # ensurepip is what Debian leaves out of python3.
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    need nodejs node
    need npm npm
    need golang-go go
    need chromium chromium
  fi
}

# Debian starts the service of what it installs; Barid wants the program only, and port 6379 free.
install_quietly() {
  echo "setup: installing ${missing[*]}"
  local policy=/usr/sbin/policy-rc.d
  local -a as_root=("$@")
  local ours=no
  if [[ ! -e "$policy" ]]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod +x "$policy"
    ours=yes
  fi
  "${as_root[@]}" apt-get update -q
  local status=0
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}" || status=$?
  if [[ "$ours" == yes ]]; then "${as_root[@]}" rm -f "$policy"; fi
  return "$status"
}

install_missing() {
  if ! command -v apt-get >/dev/null; then
    echo "setup: this is no Debian; install what brings: ${missing[*]}" >&2
    exit 1
  fi
  if [[ "$(id -u)" == 0 ]]; then
    install_quietly env
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    install_quietly sudo
  else
    {
      echo "setup: some Debian packages are missing, and only root can install them. Please run"
      echo
      echo "    sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}"
      echo
      echo "and then this again."
    } >&2
    exit 1
  fi
}

install_rust() {
  if command -v rustup >/dev/null; then
    echo "setup: installing Rust $rust_installed with rustup"
    rustup toolchain install "$rust_installed" --profile minimal --component clippy,rustfmt
    rustup default "$rust_installed"
    return
  fi
  echo "setup: no Rust from $rust_needed on here; installing $rust_installed with rustup into ${CARGO_HOME:-$HOME/.cargo}"
  # A cargo of Debian's may be on the PATH, too old: rustup asks about that unless told not to.
  curl --proto '=https' --tlsv1.2 -sSf https://static.rust-lang.org/rustup/rustup-init.sh |
    RUSTUP_INIT_SKIP_PATH_CHECK=yes sh -s -- -y -q --no-modify-path --profile minimal \
      --default-toolchain "$rust_installed" --component clippy,rustfmt
}

list_missing
if ((${#missing[@]} > 0)); then install_missing; fi
rust_is_new_enough || install_rust
if [[ "$purpose" == test ]]; then
  scripts/kafka.sh
  scripts/python.sh
  scripts/examples.sh
fi
