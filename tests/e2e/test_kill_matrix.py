"""Tests that after killing any process at any swap step, the right version serves and no process is left.

Covers the table in docs/swaps.md on the real engine, for one of two models while the other continues.
`make test-matrix` runs it.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
import pytest

from examples.load import Load
from svc.engine.orphans import runs
from svc.store.desired import read_desired
from svc.store.swaps import SwapOutcome
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance, copy_model, core_of, group, is_engine

pytestmark = [pytest.mark.matrix]

PORT = 8945
TINY, OTHER = "tiny", "other"


class Killed(Enum):
    """The process that is killed with SIGKILL."""

    GATEWAY = "gateway"
    FRONT = "front"
    CORE = "core"
    ALL = "gateway and engine"


class Moment(Enum):
    """The step of the swap at which the process is killed."""

    IDLE = "idle"
    DRAINING = "draining"
    SWAPPING = "swapping"
    STARTING = "second engine starting"
    RETIRING = "first engine retiring"


class Serving(Enum):
    """The engine that serves in the end."""

    BEFORE = "the one that served before"
    SECOND = "the second one, that was there when it happened"
    NEW = "one that was started since"


ONE, TWO, MERGED = "tiny@1 (gptq)", "tiny@2 (gptq)", "tiny@2 (merged)"
NONE, DONE, FAILED = None, SwapOutcome.SUCCEEDED, SwapOutcome.FAILED
Row = dict[Killed, tuple[str, SwapOutcome | None, Serving]]
ENGINE_IN_PLACE: Row = {
    Killed.FRONT: (ONE, FAILED, Serving.NEW),
    Killed.CORE: (ONE, FAILED, Serving.NEW),
    Killed.ALL: (TWO, DONE, Serving.NEW),
}
TABLE: dict[Moment, Row] = {
    Moment.IDLE: {
        Killed.GATEWAY: (ONE, NONE, Serving.BEFORE),
        Killed.FRONT: (ONE, NONE, Serving.NEW),
        Killed.CORE: (ONE, NONE, Serving.NEW),
        Killed.ALL: (ONE, NONE, Serving.NEW),
    },
    Moment.DRAINING: ENGINE_IN_PLACE | {Killed.GATEWAY: (TWO, DONE, Serving.BEFORE)},
    Moment.SWAPPING: ENGINE_IN_PLACE | {Killed.GATEWAY: (TWO, DONE, Serving.NEW)},
    Moment.STARTING: {
        Killed.GATEWAY: (MERGED, DONE, Serving.NEW),
        Killed.FRONT: (MERGED, DONE, Serving.SECOND),
        Killed.CORE: (MERGED, DONE, Serving.SECOND),
        Killed.ALL: (MERGED, DONE, Serving.NEW),
    },
    Moment.RETIRING: dict.fromkeys(Killed, (MERGED, DONE, Serving.SECOND)),
}


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server with two models, each with one engine."""
    with closing(Instance(home, tmp_path_factory.mktemp("kill") / "home", PORT, PROMPTS)) as instance:
        copy_model(instance.home, OTHER)
        instance.start(f"{TINY}@1", f"{OTHER}@2")
        instance.all_ready(TINY, OTHER)
        yield instance


@pytest.fixture(scope="module")
def expected(instance: Instance) -> dict[str, list[tuple[str, str]]]:
    """Return the answers of each version in each format and those of the other model."""
    answers = {OTHER: instance.answers(OTHER), ONE: instance.answers()}
    instance.promote("tiny@2")
    answers[TWO] = instance.answers()
    instance.promote("tiny@2", "--format", "merged")
    answers[MERGED] = instance.answers()
    return answers


@pytest.fixture
def serving(instance: Instance, expected: dict[str, list[tuple[str, str]]]) -> Instance:
    """Return the server with version 1 loaded in one engine and the other model in another."""
    instance.all_ready(TINY, OTHER)
    instance.until(lambda status: [engine["state"] for engine in status["engines"]] == ["ready"])
    status = instance.status()
    if (status["version"], status["format"]) != ("tiny@1", "gptq"):
        instance.promote("tiny@1", "--format", "gptq")
    instance.until(lambda status: [engine["state"] for engine in status["engines"]] == ["ready"])
    return instance


@pytest.mark.parametrize("moment", Moment, ids=lambda moment: moment.value)
@pytest.mark.parametrize("killed", Killed, ids=lambda killed: killed.value)
def test_expected_version_is_served_after_a_process_is_killed_during_a_swap(
    serving: Instance, expected: dict[str, list[tuple[str, str]]], killed: Killed, moment: Moment, report: Report
) -> None:
    serves, outcome, which = TABLE[moment][killed]
    (before,), (untouched,) = serving.engines_of(TINY), serving.engines_of(OTHER)
    promotions = serving.status()["last_swap"]["started_at"]
    lives, load = killed in (Killed.FRONT, Killed.CORE), Load(serving.url, OTHER, PROMPTS, streams=1)
    with ExitStack() as loaded:
        if lives:
            loaded.enter_context(load)
        promotion, long = at(serving, moment)
        began, engines = time.monotonic(), serving.engines_of(TINY)
        processes = {process for engine in engines for process in group(engine)}
        kill(serving, before, killed)
        if lives:
            psutil.wait_procs([before], timeout=60)  # vLLM's front exits when its core is dead
        else:
            serving.start(TINY, OTHER)
        status = serving.until(lambda status: settled(status) and len(serving.engines()) == 2)
        ready_s = time.monotonic() - began
        for client in (promotion, long):
            if client is not None:
                client.kill()
                client.wait()
    serving.all_ready(TINY, OTHER)
    answers = serving.answers()
    (engine,) = serving.engines_of(TINY)
    report(f"{killed.value} killed, {moment.value}: {status['version']} ({status['format']}) after {ready_s:.1f} s")
    desired = read_desired(serving.store(), "tiny")
    assert desired is not None
    assert (f"{status['version']} ({status['format']})", str(desired.target)) == (serves, serves)
    assert answers == expected[serves]
    if outcome is None:
        assert status["last_swap"]["started_at"] == promotions
    else:
        assert status["last_swap"]["outcome"] == outcome.value
    assert serving.engines_of(OTHER) == [untouched]
    assert serving.answers(OTHER) == expected[OTHER]
    assert load.failed == []
    assert bool(load.answers) is lives
    actual = Serving.BEFORE if engine == before else Serving.SECOND if engine in engines else Serving.NEW
    assert actual is which
    assert {process for process in processes if runs(process)} <= set(group(engine))
    assert {process for process in psutil.process_iter() if is_engine(process)} <= {*group(engine), *group(untouched)}


def at(instance: Instance, moment: Moment) -> tuple["subprocess.Popen[bytes] | None", "subprocess.Popen[bytes] | None"]:
    """Bring the server to a swap step, and return the running promotion and a client reading a long answer."""
    match moment:
        case Moment.IDLE:
            return None, None
        case Moment.DRAINING:
            long = instance.long_answer()
            promotion = instance.try_to_promote("tiny@2")
            instance.until(lambda status: any(engine["state"] == "draining" for engine in status["engines"]))
            return promotion, long
        case Moment.SWAPPING:
            promotion = instance.try_to_promote("tiny@2")
            instance.until(lambda status: any(engine["state"] == "swapping" for engine in status["engines"]))
            return promotion, None
        case Moment.STARTING:
            promotion = instance.try_to_promote("tiny@2", "--format", "merged")
            instance.until(lambda status: any(engine["state"] == "starting" for engine in status["engines"]))
            time.sleep(5)
            return promotion, None
        case Moment.RETIRING:
            promotion = instance.try_to_promote("tiny@2", "--format", "merged")
            instance.until(lambda status: any(engine["state"] == "starting" for engine in status["engines"]))
            long = instance.long_answer(again=True)
            instance.until(lambda status: any(engine["state"] == "retiring" for engine in status["engines"]))
            return promotion, long


def kill(instance: Instance, engine: psutil.Process, killed: Killed) -> None:
    """Send SIGKILL to a process of the engine that served previously."""
    victims: dict[Killed, Callable[[], list[psutil.Process]]] = {
        Killed.GATEWAY: list,
        Killed.FRONT: lambda: [engine],
        Killed.CORE: lambda: [core_of(engine)],
        Killed.ALL: lambda: group(engine),
    }
    for process in victims[killed]():
        process.kill()
    if killed in (Killed.GATEWAY, Killed.ALL):
        instance.end(signal.SIGKILL)


def settled(status: Any) -> bool:
    """Return whether one engine serves the desired version and no swap is in progress."""
    states = [engine["state"] for engine in status["engines"]]
    swap = status["last_swap"]
    return states == ["ready"] and (swap is None or swap["outcome"] is not None)
