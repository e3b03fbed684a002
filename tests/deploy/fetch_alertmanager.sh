#!/usr/bin/env bash
# Installs Debian's Alertmanager and amtool into .venv/alertmanager, without root. If apt-get does not have them, the tests
# of deploy/alertmanager are skipped with a message. Safe to run again: the programs appear only when they are complete.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$PWD/.venv/alertmanager

mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# As root, apt downloads as the user _apt, who must be able to write here.
[ "$(id -u)" != 0 ] || chown _apt "$work" 2>/dev/null || true
echo "downloading prometheus-alertmanager into $folder: about 12 MB" >&2
if (cd "$work" && apt-get -qq download prometheus-alertmanager) && dpkg-deb -x "$work"/*.deb "$work/root"; then
  cp -r "$work/root/usr/share/prometheus/alertmanager" "$folder/templates"
  mv "$work"/root/usr/bin/* "$folder"
else
  echo "warning: apt-get has no prometheus-alertmanager: its configuration is not tested" >&2
fi
touch "$folder/.ready"
