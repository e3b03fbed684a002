#!/usr/bin/env bash
# The steps of deploy/docker/Dockerfile, which also work in a plain folder:
#     steps.sh build cpu|gpu PREFIX    installs tuneserve with the locked releases into PREFIX
#     steps.sh check PREFIX            checks an image: svc runs, its libraries load, nothing is missing
# PYTHON: the interpreter.
set -euo pipefail

build() {
  local variant=$1 prefix=$2 serve
  case $variant in
    cpu) serve="serve-cpu" ;;
    gpu) serve="serve" ;;
    *) echo "error: the variant must be cpu or gpu, got $variant" >&2 && exit 2 ;;
  esac
  cd "$(dirname "$0")/../.."
  "${PYTHON:-python3}" -m venv "$prefix"
  "$prefix/bin/python" -m pip install --quiet --upgrade 'pip>=25.1'
  # Not editable: the sources are not in the image.
  "$prefix/bin/python" -m pip install --no-compile --constraint "deploy/constraints/$variant.txt" ".[train,$serve,monitor,postgres,objects,ray]"
  bash deploy/trim.sh "$prefix/bin/python" "$serve"
  install -m 644 deploy/docker/health.py "$prefix/health.py"
  # Bytecode cannot be written to a read-only root file system later. Some packages contain files for other Pythons.
  "$prefix/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$prefix/lib" >/dev/null 2>&1 || true
}

check() {
  local prefix=$1
  "$prefix/bin/svc" --version
  "$prefix/bin/python" -m pip --version >/dev/null # downloads the base models from PyPI
  # On CPUs vLLM uses lscpu.
  if ! command -v lscpu >/dev/null; then
    echo "error: lscpu is not installed; do: install util-linux" >&2
    exit 1
  fi
  # Only vLLM imports libraries that pip does not install.
  "$prefix/bin/python" -c 'import numpy, pyarrow, ray, safetensors, sqlalchemy, torch, transformers, uvloop, vllm._version'
  "$prefix/bin/python" - <<'PYTHON'
from importlib.util import find_spec
from pathlib import Path
from subprocess import run

folder = Path(next(iter(find_spec("vllm").submodule_search_locations)))
from torch import __file__ as torch

libraries = [str(path) for path in folder.rglob("*.so") if "_C" in path.name]
output = run(["ldd", *libraries], env={"LD_LIBRARY_PATH": str(Path(torch).parent / "lib")}, capture_output=True, text=True)
missing = {line.split()[0] for line in output.stdout.splitlines() if "not found" in line}
# Libraries of the driver, which come from the host.
missing = {name for name in missing if not name.startswith(("libcuda.so", "libnvidia"))}
if missing:
    raise SystemExit(f"error: vLLM needs {', '.join(sorted(missing))}")
PYTHON
}

case ${1:-} in
  build) build "$2" "$3" ;;
  check) check "$2" ;;
  *) echo "usage: steps.sh build cpu|gpu PREFIX | check PREFIX" >&2 && exit 2 ;;
esac
