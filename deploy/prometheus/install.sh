#!/usr/bin/env bash
# Installs prometheus and promtool into .venv/prometheus/bin, without root: the machine's own if both are on PATH, or else
# from the distribution's packages. Safe to run again: a binary appears only when it is complete.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=.venv/prometheus/bin
programs=(prometheus promtool)

fail() {
  echo "error: $1" >&2
  echo "  do: install Prometheus (https://prometheus.io/download), with prometheus and promtool on PATH, then run this again" >&2
  exit 1
}

runs() {
  local program
  for program in "${programs[@]}"; do
    "$1/$program" --version >/dev/null 2>&1 || return 1
  done
}

# Without package lists (as in most container images) apt finds no package; only root may download the lists.
download() {
  (cd "$work" && apt-get -qq download "$1") && return
  [ "$(id -u)" = 0 ] || return 1
  apt-get -qq update && (cd "$work" && apt-get -qq download "$1")
}

unpack() {
  download "$1" || fail "apt-get cannot download the package $1"
  dpkg-deb -x "$work/$1"_*.deb "$work/root"
}

if runs "$bin"; then
  exit 0
fi
mkdir -p "$bin"
if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
  for program in "${programs[@]}"; do
    ln -sfn "$(command -v "$program")" "$bin/$program"
  done
else
  for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || fail "prometheus is not installed, and this is not Debian: $tool is missing"
  done
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  # As root, apt downloads as the user _apt, who must be able to write here.
  [ "$(id -u)" != 0 ] || chown _apt "$work" 2>/dev/null || true
  echo "downloading prometheus and promtool into $bin (about 35 MB)" >&2
  unpack prometheus
  # Debian 13 has promtool in a separate package; earlier releases have it in prometheus.
  [ -x "$work/root/usr/bin/promtool" ] || unpack promtool
  for program in "${programs[@]}"; do
    cp "$work/root/usr/bin/$program" "$bin/.$program.part"
    mv -f "$bin/.$program.part" "$bin/$program"
  done
fi
runs "$bin" || fail "the programs installed into $bin do not run"
