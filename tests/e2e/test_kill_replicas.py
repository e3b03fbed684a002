"""Like test_kill_matrix.py, but for a server with two engines, during a rolling swap and during adoption."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
import pytest

from svc.engine.orphans import runs
from svc.store.swaps import SwapOutcome
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance, core_of, group, is_engine

pytestmark = [pytest.mark.matrix]

PORT = 8947
ONE, TWO = "tiny@1", "tiny@2"
DONE, FAILED = SwapOutcome.SUCCEEDED, SwapOutcome.FAILED


class Moment(Enum):
    """The engine that is being changed at the time of the kill."""

    FIRST = "first engine changing"
    SECOND = "second engine changing"


class Killed(Enum):
    """The process that is killed with SIGKILL."""

    GATEWAY = "gateway"
    CHANGING = "the engine that changes"
    OTHER = "the other engine"
    ALL = "gateway and engines"


TABLE: dict[tuple[Moment, Killed], tuple[str, SwapOutcome]] = {
    (Moment.FIRST, Killed.GATEWAY): (TWO, DONE),
    (Moment.FIRST, Killed.CHANGING): (ONE, FAILED),
    (Moment.FIRST, Killed.OTHER): (TWO, DONE),
    (Moment.FIRST, Killed.ALL): (TWO, DONE),
    (Moment.SECOND, Killed.GATEWAY): (TWO, DONE),
    (Moment.SECOND, Killed.CHANGING): (ONE, FAILED),
    (Moment.SECOND, Killed.OTHER): (TWO, DONE),
    (Moment.SECOND, Killed.ALL): (TWO, DONE),
}


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server with two engines."""
    folder = tmp_path_factory.mktemp("kill-replicas") / "home"
    with closing(Instance(home, folder, PORT, PROMPTS, SVC_ENGINE__REPLICAS="2")) as instance:
        instance.start("tiny@1")
        instance.until(settled)
        yield instance


@pytest.fixture(scope="module")
def expected(instance: Instance) -> dict[str, list[tuple[str, str]]]:
    """Return the answers of both versions."""
    answers = {ONE: instance.answers()}
    instance.promote(TWO)
    return answers | {TWO: instance.answers()}


@pytest.fixture
def serving(instance: Instance, expected: dict[str, list[tuple[str, str]]]) -> Instance:
    """Return the server with version 1 loaded in both engines."""
    instance.until(settled)
    if instance.status()["version"] != ONE:
        instance.promote(ONE)
    instance.until(settled)
    return instance


@pytest.mark.parametrize(("moment", "killed"), TABLE, ids=lambda value: value.value)
def test_both_engines_serve_the_same_version_after_a_process_is_killed_during_a_rolling_swap(
    serving: Instance, expected: dict[str, list[tuple[str, str]]], moment: Moment, killed: Killed, report: Report
) -> None:
    serves, outcome = TABLE[moment, killed]
    engines = serving.engines_by_replica()
    processes = {process for engine in engines.values() for process in group(engine)}
    promotion = serving.try_to_promote(TWO)
    number = changing(serving, moment)
    changed, (other,) = engines[number], [engine for replica, engine in engines.items() if replica != number]
    victims: dict[Killed, Callable[[], list[psutil.Process]]] = {
        Killed.GATEWAY: list,
        Killed.CHANGING: lambda: [core_of(changed)],
        Killed.OTHER: lambda: [core_of(other)],
        Killed.ALL: lambda: [*group(changed), *group(other)],
    }
    began = time.monotonic()
    for process in victims[killed]():
        process.kill()
    if killed in (Killed.GATEWAY, Killed.ALL):
        serving.end(signal.SIGKILL)
        serving.start()
    else:  # a front whose core is dead also ends: by itself, or stopped by the server when it notices
        psutil.wait_procs([changed if killed is Killed.CHANGING else other], timeout=60)
    status = serving.until(settled)
    promotion.kill()
    promotion.wait()
    report(f"{killed.value} killed, {moment.value}: {status['version']} on both after {time.monotonic() - began:.1f} s")
    assert (status["version"], status["last_swap"]["outcome"]) == (serves, outcome.value)
    assert {engine["version"] for engine in status["engines"]} == {serves}
    assert serving.answers() == expected[serves]
    now = {process for engine in serving.engines() for process in group(engine)}
    assert {process for process in processes if runs(process)} <= now
    assert {process for process in psutil.process_iter() if is_engine(process)} <= now


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_no_engine_is_orphaned_if_the_server_exits_while_adopting_engines(
    serving: Instance, expected: dict[str, list[tuple[str, str]]], number: signal.Signals
) -> None:
    engines = serving.engines()
    serving.end(signal.SIGKILL)
    log = serving.home / "logs" / "serve.log"
    adopted = log.read_text("utf-8", errors="replace").count("adopted a running engine")
    adopting = serving.launch()
    deadline = time.monotonic() + 60
    while log.read_text("utf-8", errors="replace").count("adopted a running engine") == adopted:  # the first of two
        assert time.monotonic() < deadline
        assert adopting.poll() is None
        time.sleep(0.002)
    serving.end(number)
    if number is signal.SIGTERM:
        assert not any(runs(engine) for engine in engines)
    serving.start()
    serving.until(settled)
    assert serving.answers() == expected[ONE]
    if number is signal.SIGKILL:
        assert serving.engines() == engines


def changing(instance: Instance, moment: Moment) -> int:
    """Wait for a step of a rolling swap and return the replica that is being changed."""

    def changing_replicas(status: Any) -> list[int]:
        engines = status["engines"]
        other = ONE if moment is Moment.FIRST else TWO
        return [
            engine["replica"]
            for index, engine in enumerate(engines)
            if engine["state"] in ("draining", "swapping") and engines[1 - index]["version"] == other
        ]

    (number,) = changing_replicas(instance.until(changing_replicas, timeout_s=60))
    return number


def settled(status: Any) -> bool:
    """Return whether both engines serve the desired version and no swap is in progress."""
    swap, states = status["last_swap"], [engine["state"] for engine in status["engines"]]
    return states == ["ready", "ready"] and (swap is None or swap["outcome"] is not None)
