#!/usr/bin/env bash
# Sets up .venv with all packages. Safe to run again: pip goes on where an interrupted run stopped.
# PYTHON: which one. SERVE: serve or serve-cpu. NEWEST=1: the newest releases instead of those of deploy/constraints.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
serve=${SERVE:-serve-cpu}
constraints=deploy/constraints/$([ "$serve" = serve ] && echo gpu || echo cpu).txt
log=.venv/install.log

# Runs pip with one line of progress: every second on a terminal, every 15 seconds elsewhere.
with_progress() {
  "$@" >"$log" 2>&1 &
  pip=$!
  trap 'kill "$pip" 2>/dev/null || true' EXIT
  local every=15 begin='' end=$'\n'
  [ -t 2 ] && every=1 begin=$'\r' end=''
  SECONDS=0
  local told=0
  while kill -0 "$pip" 2>/dev/null; do
    sleep 0.5
    if ((SECONDS - told >= every)); then
      told=$SECONDS
      if grep -q '^Installing collected' "$log"; then state='writing them to disk'; else
        state="$(grep -c '^Collecting' "$log" || true) of $(wc -l <"$constraints") found"
      fi
      printf '%s  installing packages: %s after %d s    %s' "$begin" "$state" "$SECONDS" "$end" >&2
    fi
  done
  [ -z "$begin" ] || printf '\r%70s\r' '' >&2
  if ! wait "$pip"; then
    tail -n 20 "$log" >&2
    echo "error: pip could not install the packages; all that it said is in $log" >&2
    echo "  do: see the lines above; run it again, or with NEWEST=1 if a release has gone from the index" >&2
    exit 1
  fi
  trap - EXIT
}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version) at $(command -v "$python"); tuneserve needs Python 3.11 or newer" >&2
  echo "  do: make install PYTHON=/path/to/python3.11" >&2
  exit 1
fi
# A folder whose pip does not run is what is left of an interrupted `venv`.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -rf .venv
  if ! "$python" -m venv .venv; then
    echo "  do: apt-get install python3-venv" >&2
    exit 1
  fi
fi
echo "installing packages into .venv: about 3.6 GB, some minutes" >&2
.venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
chosen=(--constraint "$constraints")
[ -z "${NEWEST:-}" ] || chosen=(--upgrade --upgrade-strategy eager)
with_progress .venv/bin/python -m pip install "${chosen[@]}" --editable ".[train,$serve,monitor]" --group dev
bash deploy/trim.sh .venv/bin/python "$serve"
.venv/bin/svc --version
