#!/usr/bin/env bash
# Sets up .venv with all packages. Safe to run again: pip resumes an interrupted run.
# PYTHON: the interpreter. SERVE: serve or serve-cpu. NEWEST=1: the newest releases, not those in deploy/constraints.
# TORCH_INDEX: a mirror of PyTorch's index of CPU builds.
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
  local printed=0
  while kill -0 "$pip" 2>/dev/null; do
    sleep 0.5
    if ((SECONDS - printed >= every)); then
      printed=$SECONDS
      if grep -q '^Installing collected' "$log"; then state='writing them to disk'; else
        state="$(grep -c '^Collecting' "$log" || true) of $(wc -l <"$constraints") found"
      fi
      printf '%s  installing packages: %s after %d s    %s' "$begin" "$state" "$SECONDS" "$end" >&2
    fi
  done
  [ -z "$begin" ] || printf '\r%70s\r' '' >&2
  if ! wait "$pip"; then
    tail -n 20 "$log" >&2
    echo "error: pip could not install the packages; its full output is in $log" >&2
    echo "  do: read the lines above, then run this again, with NEWEST=1 if a release has disappeared from the index" >&2
    [ "$serve" = serve ] || [ -n "${torch_index[*]-}" ] ||
      echo "  do: if torch is missing, specify a mirror of its CPU builds: make install TORCH_INDEX=https://..." >&2
    exit 1
  fi
  trap - EXIT
}

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'; then
  echo "error: found $("$python" --version) at $(command -v "$python"); tuneserve requires Python 3.11 to 3.14, like vLLM" >&2
  echo "  do: make install PYTHON=/path/to/python3.11" >&2
  exit 1
fi
# Requirements outside pip: gptqmodel compiles a part at its first run, and requires a package without a wheel; vLLM for
# CPUs links libnuma.
missing=()
command -v g++ >/dev/null || missing+=(g++)
"$python" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
"$python" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || missing+=(python3-dev)
[ "$serve" = serve ] || "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || missing+=(libnuma1)
if [ ${#missing[@]} -gt 0 ]; then
  echo "error: missing Debian packages: ${missing[*]}" >&2
  echo "  do: apt-get install ${missing[*]}" >&2
  exit 1
fi
# A folder whose pip does not run is left from an interrupted `venv`.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -rf .venv
  "$python" -m venv .venv
fi
echo "installing packages into .venv (about 3.9 GB, takes a few minutes)" >&2
.venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
chosen=(--constraint "$constraints")
[ -z "${NEWEST:-}" ] || chosen=(--upgrade --upgrade-strategy eager)
mapfile -t torch_index < <([ "$serve" = serve ] || .venv/bin/python deploy/constraints/torch_index.py)
with_progress .venv/bin/python -m pip install "${chosen[@]}" "${torch_index[@]}" --editable ".[train,$serve,monitor]" --group dev
bash deploy/trim.sh .venv/bin/python "$serve"
.venv/bin/python -m compileall -q -j 0 svc trainer serving monitoring # pip does not; the first command would take longer
.venv/bin/svc --version
