"""Compares the time until `svc serve` is ready with that of the vLLM server it starts.

Each pair consists of two starts, in alternating order: vLLM alone, with the arguments and environment
from `svc serve`, until its `/health` returns 200; and `svc serve`, until the gateway's `/health` does.
Both times are measured from the start of the process. A start of `svc serve` has three parts: until vLLM
is started, vLLM's own start, and from vLLM's `/health` to the gateway's. The machine's noise is in the
order of seconds, so only differences within pairs are meaningful, and the parts explain them. If other
work makes even the differences too noisy, the first and last part still show our cost.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import httpx

from benchmarks.interval import interval
from serving.rollout.initial_state import choose_desired
from svc.engine.device import ask_capabilities, read_capabilities
from svc.engine.vllm.folders import socket_folder, state_folder
from svc.engine.vllm.launch import EngineSpec, command, environment
from svc.errors import EngineError
from svc.invocation import print_json
from svc.registry.registry import Registry
from svc.settings.load import load_settings
from svc.settings.settings import Settings
from svc.store.database import open_store
from svc.terminal import counting, output

_POLL_S = 0.05
_STOP_S = 60.0
_CLAIM = 2.0
"""Maximum extra time of `svc serve` that the project promises, in seconds."""


@dataclass(frozen=True, slots=True)
class Start:
    """Times of one start of `svc serve`, in seconds.

    Attributes:
        before: time from the start of `svc serve` to the start of vLLM.
        engine: time from vLLM's start until its `/health` returns 200.
        after: time from then until the gateway's `/health` returns 200.
    """

    before: float
    engine: float
    after: float

    @property
    def total(self) -> float:
        """Return the time from the start of the process until the gateway responds."""
        return self.before + self.engine + self.after


@dataclass(frozen=True, slots=True)
class Pair:
    """Two consecutive starts, one of vLLM alone and one of `svc serve`.

    Attributes:
        bare: start time of vLLM alone in seconds.
        served: start times of `svc serve`.
    """

    bare: float
    served: Start

    @property
    def difference(self) -> float:
        """Return the extra start time of `svc serve` in seconds."""
        return self.served.total - self.bare


@dataclass(frozen=True, slots=True)
class Subject:
    """The server whose start is measured."""

    settings: Settings
    spec: EngineSpec

    @classmethod
    def of(cls, settings: Settings, model: str) -> "Subject":
        """Return what `svc serve MODEL` would start with this home.

        Raises:
            NotFoundError: the model does not exist or has no version.
        """
        registry = Registry.of(settings)
        target = choose_desired(registry, open_store(settings), model, None).target
        spec = EngineSpec(
            model=registry.artifact(target.version, target.format),
            served_name=target.version.name,
            runtime=socket_folder(settings.home, 0),
            state=state_folder(settings.home, 0),
            log=settings.home / "logs" / "engine.log",
            cache=settings.home / "cache" / "vllm",
            capabilities=read_capabilities(settings.home),
            settings=settings.engine,
        )
        return cls(settings, spec)

    def start_bare(self) -> float:
        """Start vLLM alone, stop it, and return the number of seconds until it responded."""
        self.spec.socket.unlink(missing_ok=True)
        arguments, variables = command(self.spec), environment(self.spec)
        with self._engine() as engine:
            began = time.monotonic()
            with _Running(arguments, self.spec.log, variables) as server:
                server.until(lambda: _healthy(engine))
                return time.monotonic() - began

    def start_served(self) -> Start:
        """Start `svc serve`, stop it, and return its start times."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [sys.executable, "-m", "svc.cli", "--home", str(self.settings.home)]
        arguments += ["serve", self.spec.served_name, "--host", "127.0.0.1", "--port", str(port)]
        log = self.settings.home / "logs" / "serve.log"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as gateway, self._engine() as engine:
            began = time.monotonic()
            with _Running(arguments, log, os.environ) as server:
                # An engine's record is written when its process has started.
                server.until((self.spec.state / "engine.json").exists)
                launched = time.monotonic()
                server.until(lambda: _healthy(engine))
                answered = time.monotonic()
                server.until(lambda: _healthy(gateway))
                return Start(launched - began, answered - launched, time.monotonic() - answered)

    def _engine(self) -> httpx.Client:
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self.spec.socket)), base_url="http://engine")


class _Running:
    """Context manager that runs a server process. The process stops its own children."""

    def __init__(self, arguments: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
        self._arguments = arguments
        self._log = log
        self._variables = variables

    def __enter__(self) -> "_Running":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=dict(self._variables)
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(_STOP_S)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait without a time limit until a condition is true.

        Raises:
            EngineError: the server has stopped.
        """
        while not condition():
            if self._process.poll() is not None:
                raise EngineError(f"the server exited with code {self._process.returncode}", todo=f"read {self._log}")
            time.sleep(_POLL_S)


def _healthy(server: httpx.Client) -> bool:
    try:
        return server.get("/health", timeout=5.0).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def measure(subject: Subject, pairs: int) -> list[Pair]:
    """Return pairs of starts in alternating order, after one start of each server to warm the file cache."""
    measured = []
    with counting("starts", 2 * (pairs + 1)) as advance:
        for number in range(pairs + 1):
            bare = subject.start_bare() if number % 2 else None
            served = subject.start_served()
            advance()
            pair = Pair(subject.start_bare() if bare is None else bare, served)
            advance()
            if number:
                measured.append(pair)
    return measured


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the median times in seconds, plus the confidence interval of the mean difference.

    The medians of the parts are computed separately and need not add up to the median difference.
    """
    served = [pair.served for pair in pairs]
    parts = {field.name: statistics.median(getattr(start, field.name) for start in served) for field in fields(Start)}
    bare = statistics.median(pair.bare for pair in pairs)
    differences = [pair.difference for pair in pairs]
    return {
        "bare": bare,
        "served": statistics.median(start.total for start in served),
        "difference": statistics.median(differences),
        "interval": interval(differences),
        "before": parts["before"],
        "engine_over_bare": statistics.median(pair.served.engine - pair.bare for pair in pairs),
        "after": parts["after"],
        "own": statistics.median(start.before + start.after for start in served),
    }


def _first_time(times: int) -> float:
    """Return the median extra time when a first command on a device or after an update queries torch and vLLM."""
    durations = []
    for _ in range(times):
        began = time.monotonic()
        ask_capabilities()
        durations.append(time.monotonic() - began)
    return statistics.median(durations)


@click.command()
@click.argument("model")
@click.option("--home", type=click.Path(path_type=Path), help="Folder for all state.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True, help="Number of starts of each kind.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(model: str, home: Path | None, pairs: int, as_json: bool) -> None:
    """Compare the start time of `svc serve MODEL` with that of vLLM alone. No server may be running on the home."""
    from rich.table import Table

    measured = measure(Subject.of(load_settings(home=home), model), pairs)
    result = summary(measured) | {"first": _first_time(pairs)}
    if as_json:
        print_json({**result, "pairs": [asdict(pair) for pair in measured]})
        return
    low, high = result["interval"]
    table = Table("seconds", "median", box=None)
    difference = f"{result['difference']:.2f}  (mean within {low:.2f} to {high:.2f}; at most {_CLAIM:g})"
    table.add_row("vLLM alone", f"{result['bare']:.2f}")
    table.add_row("svc serve", f"{result['served']:.2f}")
    table.add_row("difference", difference)
    table.add_row("  before vLLM is started", f"{result['before']:.2f}")
    table.add_row("  longer start of vLLM itself", f"{result['engine_over_bare']:.2f}")
    table.add_row("  from vLLM ready to gateway ready", f"{result['after']:.2f}")
    table.add_row("before and after the start of vLLM itself", f"{result['own']:.2f}")
    table.add_row("once per device: detection of its capabilities", f"{result['first']:.2f}")
    output.print(f"{len(measured)} pairs of starts")
    output.print(table)


if __name__ == "__main__":
    main()
