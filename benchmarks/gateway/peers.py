"""Defines the measured gateways and the commands that start them in front of the upstream."""

import os
import secrets
import shutil
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gateway.load import Address
from benchmarks.gateway.table import BARE, DIRECT
from benchmarks.gateway.upstream import MODEL

MAX_STREAMS = 2048
"""Limit on concurrent requests, higher than the number ever sent so that no gateway reaches it."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """Addresses at which the upstream listens."""

    socket: Path
    port: int


@dataclass(frozen=True, slots=True)
class Command:
    """Command that starts a gateway, with the gateway's address."""

    arguments: Sequence[str]
    address: Address
    variables: Mapping[str, str]


class Peer(ABC):
    """A gateway to measure.

    Attributes:
        name: name shown in the table and accepted by `--only`.
    """

    name: str

    @property
    def missing(self) -> str:
        """Return why the gateway cannot be started here, or an empty string if it can."""
        return ""

    @abstractmethod
    def command(self, upstream: Upstream, folder: Path) -> Command | None:
        """Return the command that starts the gateway, or None if there is nothing to start.

        Args:
            folder: an empty folder for the gateway's files.
        """


class Direct(Peer):
    """Direct connection to the upstream, without a gateway."""

    name = DIRECT

    def command(self, upstream: Upstream, folder: Path) -> None:
        """Return None, because the upstream is already running."""


class Bare(Peer):
    """Our HTTP server and our connections to the engine, without the gateway. See benchmarks.gateway.bare."""

    name = BARE

    def command(self, upstream: Upstream, folder: Path) -> Command:
        """Return the command that starts a single process."""
        port = free_port()
        return Command(
            [sys.executable, "-m", "benchmarks.gateway.bare", str(upstream.socket), str(port)], Address(port), {}
        )


@dataclass(frozen=True)
class Ours(Peer):
    """`svc serve` with request rows and metrics.

    Args:
        home: home of the server, copied for each start.
        key: secret of the only key in the home; empty if there is no key.
        traced: whether a span for each request is sent to the upstream's port.
        store: URL of the database with the home's rows, or empty for the home's own file.
        replicas: number of engines, which are all the same upstream.
    """

    name: str
    home: Path
    key: str = ""
    traced: bool = False
    store: str = ""
    replicas: int = 1

    def command(self, upstream: Upstream, folder: Path) -> Command:
        """Return the server's own command with its engine replaced."""
        home, port = folder / "home", free_port()
        shutil.copytree(self.home, home)
        arguments = [sys.executable, "-m", "benchmarks.gateway.ours", str(upstream.socket), "--home", str(home)]
        arguments += ["serve", MODEL, "--port", str(port)]
        variables = {
            "TMPDIR": str(folder),  # for the folders of sockets
            "SVC_SERVE__MAX_RUNNING": str(MAX_STREAMS),
            "SVC_HOLDOUT__EVERY_HOURS": "0",  # held-out evaluations are not requests of clients
            "SVC_ENGINE__REPLICAS": str(self.replicas),
        }
        if self.traced:
            variables["SVC_TELEMETRY__OTLP_ENDPOINT"] = f"http://127.0.0.1:{upstream.port}"
        if self.store:
            variables["SVC_STORE__URL"] = self.store
        return Command(arguments, Address(port, self.key), variables)


@dataclass(frozen=True)
class Installed(Peer):
    """A gateway program installed by `install_peers.sh`."""

    bin: Path
    program: str

    @property
    def path(self) -> Path:
        """Return the program's path."""
        return self.bin / self.program

    @property
    def missing(self) -> str:
        """Return why the program cannot be started, or an empty string if it is installed."""
        return "" if os.access(self.path, os.X_OK) else f"{self.path} is not installed"


@dataclass(frozen=True)
class Nginx(Installed):
    """The nginx reverse proxy, which knows nothing about models."""

    program: str = "nginx"
    name: str = "nginx"

    def command(self, upstream: Upstream, folder: Path) -> Command:
        """Return the nginx command with one worker, keep-alive connections to the upstream and no buffering."""
        port = free_port()
        config = folder / "nginx.conf"
        config.write_text(_NGINX.format(folder=folder, socket=upstream.socket, port=port, user=_user()))
        arguments = [str(self.path), "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
        return Command(arguments, Address(port), {})


@dataclass(frozen=True)
class VllmRouter(Installed):
    """vLLM's own router, written in Rust."""

    program: str = "vllm-router"
    name: str = "vllm-router"

    def command(self, upstream: Upstream, folder: Path) -> Command:
        """Return the command with one worker and round robin, because the other policies read prompts."""
        port = free_port()
        arguments = [str(self.path), "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
        arguments += ["--worker-urls", f"http://127.0.0.1:{upstream.port}"]
        arguments += ["--prometheus-port", str(free_port()), "--log-level", "warning"]
        return Command(arguments, Address(port), {})


@dataclass(frozen=True)
class LiteLLM(Installed):
    """LiteLLM's proxy without a database. It has one key, which LiteLLM requires."""

    program: str = "litellm"
    name: str = "LiteLLM"

    def command(self, upstream: Upstream, folder: Path) -> Command:
        """Return the LiteLLM command with one worker."""
        port, key = free_port(), f"sk-{secrets.token_hex(32)}"
        config = folder / "litellm.yaml"
        config.write_text(_LITELLM.format(model=MODEL, port=upstream.port))
        arguments = [str(self.path), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        variables = {
            "LITELLM_MASTER_KEY": key,
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # otherwise downloaded at each start
            "NO_DOCS": "True",
        }
        return Command([*arguments, "--telemetry", "False"], Address(port, key), variables)


_NGINX = """\
{user}
daemon off;
worker_processes 1;
worker_rlimit_nofile 65536;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream engine {{
    server unix:{socket};
    keepalive 2048;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""
_LITELLM = """\
model_list:
  - model_name: {model}
    litellm_params:
      model: hosted_vllm/{model}
      api_base: http://127.0.0.1:{port}/v1
      api_key: none
litellm_settings:
  telemetry: false
"""


def _user() -> str:
    """Return nginx's `user` directive for root, because other users' workers could not open the socket."""
    return "user root;" if os.getuid() == 0 else ""


def free_port() -> int:
    """Return a port that is currently free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
