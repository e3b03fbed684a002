#!/usr/bin/env bash
# Puts llama.cpp with a JavaScript interface into .venv/llama-cpp, from npm: prebuilt for Linux on x86-64, about 85 MB.
# Without npm the tests that need it are skipped and say so. Safe to run again: the folder appears when it is complete.
set -euo pipefail
cd "$(dirname "$0")/../../../.."
folder=$PWD/.venv/llama-cpp
version=3.22.1

[ ! -f "$folder/.ready" ] || exit 0
work=$(mktemp -d "$PWD/.venv/llama-cpp-XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "downloading node-llama-cpp $version into $folder" >&2
options=(--silent --no-audit --no-fund --omit=optional --ignore-scripts --prefix "$work")
if ! npm install "${options[@]}" "node-llama-cpp@$version" "@node-llama-cpp/linux-x64@$version"; then
  echo "warning: npm cannot fetch node-llama-cpp: GGUF files are not tested in llama.cpp" >&2
  exit 0
fi
touch "$work/.ready"
rm -rf "$folder"
mv "$work" "$folder"
