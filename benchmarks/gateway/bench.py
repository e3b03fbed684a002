"""The benchmark environment: two cores, the upstream, and gateways that are started and stopped in turn.

The gateway has its own core; the clients and the upstream share the other one.
"""

import gc
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import uvloop

from benchmarks.gateway.load import Address, Ask, answers
from benchmarks.gateway.measure import Figures, Measurement
from benchmarks.gateway.peers import Ours, Peer, Upstream, free_port
from benchmarks.gateway.processes import running
from benchmarks.gateway.table import KEYLESS, OURS, REPLICATED, STORED, TRACED
from svc.errors import EngineError, SettingsError
from svc.terminal import console

_ONCE = Ask(chunks=1)
_POLL_S = 0.2
_LOG_CHARS = 2000
_KEY_LIMITS = ("requests-per-minute", "tokens-in-per-minute", "tokens-out-per-minute", "concurrent", "tokens-per-day")
_NEVER = str(2**31 - 1)
_REPLICAS = 20


@dataclass(frozen=True, slots=True)
class Cores:
    """Assignment of CPU cores to the gateway and to the clients."""

    gateway: int
    others: int

    @classmethod
    def of_machine(cls) -> "Cores":
        """Return two of the CPU cores available to this process.

        Raises:
            SettingsError: this process may use only one core.
        """
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise SettingsError(
                "this process is limited to one core", expected="at least two cores, one of them for the gateway"
            )
        return cls(gateway=cores[1], others=cores[0])


@dataclass(frozen=True, slots=True)
class Bench:
    """The environment shared by all measurements."""

    cores: Cores
    folder: Path
    upstream: Upstream

    def measure(self, peer: Peer, name: str) -> Figures:
        """Start a gateway, measure it and stop it.

        Args:
            name: name of the gateway's folder and log.
        """
        with self.started(peer, name) as (address, pid):
            return uvloop.run(self._measurement(address, pid, peer).run())

    @contextmanager
    def started(self, peer: Peer, name: str) -> Iterator[tuple[Address, int | None]]:
        """Run a gateway while the context is active, and yield its address and the id of its first process.

        Args:
            name: name of the gateway's folder and log.
        """
        folder = self.folder / name
        folder.mkdir()
        command = peer.command(self.upstream, folder)
        with ExitStack() as stack:
            address, pid = Address(self.upstream.port), None
            if command:
                log = self.folder / f"{name}.log"
                address = command.address
                process = stack.enter_context(
                    running(command.arguments, core=self.cores.gateway, log=log, variables=command.variables)
                )
                pid = process.pid
                until_answered(process, log, address, _ONCE)
            gc.collect()
            gc.disable()
            try:
                yield address, pid
            finally:
                gc.enable()

    def _measurement(self, address: Address, pid: int | None, peer: Peer) -> Measurement:
        return Measurement(address, pid, self.cores.gateway, self._set_pace, partial(_tell, peer))

    def _set_pace(self, seconds: float) -> None:
        httpx.post(f"http://127.0.0.1:{self.upstream.port}/pace", content=str(seconds))


def _tell(peer: Peer, text: str) -> None:
    console.print(f"  {peer.name}: {text}", markup=False)


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """Run the upstream while the context is active, with this process pinned to the same core."""
    cores, upstream = Cores.of_machine(), Upstream(folder / "upstream.sock", free_port())
    os.sched_setaffinity(0, {cores.others})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    arguments = [sys.executable, "-m", "benchmarks.gateway.upstream"]
    arguments += ["--socket", str(upstream.socket), "--port", str(upstream.port)]
    log = folder / "upstream.log"
    with running(arguments, core=cores.others, log=log) as process:
        until_answered(process, log, Address(upstream.port), _ONCE)
        yield Bench(cores, folder, upstream)


def until_answered(
    process: "subprocess.Popen[bytes]", log: Path, address: Address, ask: Ask, *, seconds: float = 60.0
) -> None:
    """Wait until a server responds to a request.

    Raises:
        EngineError: the server stopped or did not respond in time; the message includes the end of its log.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineError(f"the process exited with code {process.returncode}: {_end_of(log)}")
        if uvloop.run(answers(address, ask)):
            return
        time.sleep(_POLL_S)
    raise EngineError(f"no response within {seconds:.0f} s: {_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-_LOG_CHARS:]


def make_ours(folder: Path, store: str = "") -> list[Peer]:
    """Create homes, and return our gateway with a key, without keys, with a key and traces, with a key and many
    replicas, and with a key and a database.

    Args:
        store: URL of an empty PostgreSQL database, or empty to leave that gateway out.
    """
    console.print("creating the home folders of tuneserve")
    keyless, keyed = folder / "keyless", folder / "keyed"
    subprocess.run([sys.executable, "-m", "benchmarks.gateway.home", str(keyless)], check=True)
    shutil.copytree(keyless, keyed)
    arguments = [sys.executable, "-m", "svc.cli", "--home", str(keyed), "keys", "create", "--scope", "infer"]
    arguments += [argument for limit in _KEY_LIMITS for argument in (f"--{limit}", _NEVER)]
    result = subprocess.run(arguments, check=True, capture_output=True, text=True)
    key = result.stdout.strip()
    ours: list[Peer] = [
        Ours(OURS, keyed, key),
        Ours(KEYLESS, keyless),
        Ours(TRACED, keyed, key, traced=True),
        Ours(REPLICATED, keyed, key, replicas=_REPLICAS),
    ]
    if store:
        migrate = [sys.executable, "-m", "svc.cli", "--home", str(keyed), "store", "migrate", "--to", store]
        subprocess.run(migrate, check=True, stdout=subprocess.DEVNULL)
        ours.append(Ours(STORED, keyed, key, store=store))
    return ours
