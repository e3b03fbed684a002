"""`make bench-gateway`: all gateways in front of one upstream, in turn, again and again.

The gateway has one core, and what asks it and what answers it have another. Processor time says what a request costs;
times to the first token mean something on a quiet machine alone.
"""

import gc
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import httpx
import uvloop

from benchmarks.gateway.load import Address, answers
from benchmarks.gateway.measure import Figures, Measurement
from benchmarks.gateway.peers import Direct, LiteLLM, Nginx, Ours, Peer, Upstream, VllmRouter, free_port
from benchmarks.gateway.processes import running
from benchmarks.gateway.table import summary, tables
from svc.errors import EngineError, SettingsError
from svc.terminal import console, output, print_json

_START_S = 60.0
_POLL_S = 0.2
_KEY_LIMITS = ("requests-per-minute", "tokens-in-per-minute", "tokens-out-per-minute", "concurrent", "tokens-per-day")
_NEVER = str(2**31 - 1)


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core is whose."""

    gateway: int
    others: int

    @classmethod
    def of_machine(cls) -> "Cores":
        """Two of those that this process may use.

        Raises:
            SettingsError: there is one alone.
        """
        found = sorted(os.sched_getaffinity(0))
        if len(found) < 2:
            raise SettingsError("this process has one core", expected="two: one for the gateway, one for the rest")
        return cls(gateway=found[1], others=found[0])


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements have in common."""

    cores: Cores
    folder: Path
    upstream: Upstream

    def measure(self, peer: Peer, name: str) -> Figures:
        """One gateway, freshly started, and ended afterwards.

        Args:
            name: of its folder.
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
                _until_answered(address, process, log)
            gc.collect()
            gc.disable()
            try:
                return uvloop.run(Measurement(address, pid, self._set_pace, partial(_tell, peer)).run())
            finally:
                gc.enable()

    def _set_pace(self, seconds: float) -> None:
        httpx.post(f"http://127.0.0.1:{self.upstream.port}/pace", content=str(seconds))


def _tell(peer: Peer, text: str) -> None:
    console.print(f"  {peer.name}: {text}", markup=False)


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """The upstream, for the body of the `with`; this process is pinned beside it."""
    cores, upstream = Cores.of_machine(), Upstream(folder / "upstream.sock", free_port())
    os.sched_setaffinity(0, {cores.others})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    arguments = [sys.executable, "-m", "benchmarks.gateway.upstream"]
    arguments += ["--socket", str(upstream.socket), "--port", str(upstream.port)]
    log = folder / "upstream.log"
    with running(arguments, core=cores.others, log=log) as process:
        _until_answered(Address(upstream.port), process, log)
        yield Bench(cores, folder, upstream)


def _until_answered(address: Address, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineError(f"it ended with code {process.returncode}: {log.read_text()[-2000:]}")
        if uvloop.run(answers(address)):
            return
        time.sleep(_POLL_S)
    raise EngineError(f"no answer within {_START_S:.0f} s: {log.read_text()[-2000:]}")


def make_ours(folder: Path) -> list[Peer]:
    """Ours, with a key and without: the homes are alike but for that."""
    console.print("a home for ours")
    keyless, keyed = folder / "keyless", folder / "keyed"
    subprocess.run([sys.executable, "-m", "benchmarks.gateway.home", str(keyless)], check=True)
    shutil.copytree(keyless, keyed)
    arguments = [sys.executable, "-m", "svc.cli", "--home", str(keyed), "keys", "create", "--scope", "infer"]
    arguments += [argument for limit in _KEY_LIMITS for argument in (f"--{limit}", _NEVER)]
    made = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return [Ours("tuneserve", keyed, made.stdout.strip()), Ours("tuneserve without keys", keyless)]


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often each is measured.")
@click.option("--only", help="Names of those to measure, with commas between.")
@click.option(
    "--peers",
    type=click.Path(path_type=Path),
    default=Path(".venv/peers"),
    show_default=True,
    help="Where install_peers.sh has put them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def main(rounds: int, only: str | None, peers: Path, as_json: bool) -> None:
    """Measure what a request costs on its way through each gateway."""
    with tempfile.TemporaryDirectory(prefix="gw") as name, bench(Path(name)) as found:
        bin = peers.absolute() / "bin"
        chosen: list[Peer] = [Direct(), *make_ours(found.folder), LiteLLM(bin), VllmRouter(bin), Nginx(bin)]
        chosen = _choose(chosen, only)
        measured = []
        for number in range(rounds):
            figures = {}
            for peer in chosen if number % 2 == 0 else reversed(chosen):
                began = time.monotonic()
                figures[peer.name] = found.measure(peer, f"{peer.name.replace(' ', '-')}-{number}")
                took = time.monotonic() - began
                console.print(f"round {number + 1} of {rounds}: {peer.name}, {took:.0f} s", markup=False)
            measured.append(figures)
    result = summary(measured)
    if as_json:
        print_json({**result, "rounds": [{name: asdict(each) for name, each in one.items()} for one in measured]})
        return
    for table in tables(result):
        output.print(table)


def _choose(peers: Sequence[Peer], only: str | None) -> list[Peer]:
    names = {"direct", *only.split(",")} if only else {peer.name for peer in peers}
    if unknown := names - {peer.name for peer in peers}:
        raise click.UsageError(f"there is no {', '.join(sorted(unknown))}: {', '.join(peer.name for peer in peers)}")
    for peer in peers:
        if peer.name in names and peer.missing:
            console.print(f"{peer.name} is left out: {peer.missing}", markup=False)
    return [peer for peer in peers if peer.name in names and not peer.missing]


if __name__ == "__main__":
    main()
