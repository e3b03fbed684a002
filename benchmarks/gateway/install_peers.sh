#!/usr/bin/env bash
# Installs the gateways that ours is compared with into $PEERS (.venv/peers), without root: LiteLLM's proxy and vllm-router
# in a separate Python environment with versions independent of ours, and nginx: the machine's own, or that of the
# distribution's package. Reports gateways that cannot be installed; they are skipped in the table. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
peers=${PEERS:-.venv/peers}
PYTHON=${PYTHON:-python3}

missing() {
  echo "warning: $1 is skipped in the benchmark: $2" >&2
}

install_python() {
  [ ! -x "$peers/bin/$2" ] || return 0
  echo "installing $1 into $peers" >&2
  "$peers/bin/pip" install --quiet --disable-pip-version-check "$1" || missing "$1" "pip cannot install it"
}

install_nginx() {
  ! "$peers/bin/nginx" -v 2>/dev/null || return 0
  local found
  if found=$(PATH=$PATH:/usr/sbin command -v nginx); then
    ln -sfn "$found" "$peers/bin/nginx"
    return
  fi
  local work
  work=$(mktemp -d)
  # As root, apt downloads as the user _apt, who must be able to write here.
  [ "$(id -u)" != 0 ] || chown _apt "$work" 2>/dev/null || true
  if (cd "$work" && apt-get -qq download nginx) && dpkg-deb -x "$work"/nginx_*.deb "$work/root" &&
    "$work/root/usr/sbin/nginx" -v 2>/dev/null; then
    mv -f "$work/root/usr/sbin/nginx" "$peers/bin/nginx"
  else
    missing nginx "it is not installed, and apt-get cannot download a package that runs here"
  fi
  rm -rf "$work"
}

[ -x "$peers/bin/pip" ] || "$PYTHON" -m venv "$peers"
install_python "litellm[proxy]" litellm
install_python vllm-router vllm-router
install_nginx
