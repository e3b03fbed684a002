"""A busy day on the real engine: good and bad clients, a swap every half minute, a killed engine every two minutes.

`make soak` runs it, for ten minutes or for MINUTES of them.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance, core_of
from tests.e2e.lag import lag_figure, read_lag
from tests.e2e.soak import Clients, Tally

pytestmark = [pytest.mark.soak]

PORT = 8946
MINUTES = float(os.environ.get("MINUTES", "10"))
SWAP_EVERY_S = 30.0
KILL_EVERY_S = 120.0
SAMPLE_EVERY_S = 2.0
WARM_S = 60.0
"""Caches fill, and what is imported late comes."""
REST_S = 20.0
"""Connections that were closed, and are not read, end after fifteen seconds."""
SEEN_S = 0.1
"""From an error in the server to the client's clock, which shares two processors with everything else."""
_FAR = 1e12


@dataclass
class Kill:
    """An engine that was killed.

    Attributes:
        at, ready: monotonic times, seconds.
        running: requests of good clients that ran.
    """

    at: float
    running: int
    ready: float = _FAR

    def covers(self, when: float) -> bool:
        """Whether the engine was away then; a moment before, since a client hears of it first."""
        return self.at - 0.5 <= when <= self.ready + 0.5


@dataclass
class Watched:
    """What was done to the server, and what it took meanwhile."""

    kills: list[Kill] = field(default_factory=list)
    swaps: list[tuple[float, float, int]] = field(default_factory=list)  # begin, end, exit code
    lag: Counter[float] = field(default_factory=Counter)  # during swaps
    memory: list[int] = field(default_factory=list)
    descriptors: tuple[int, int] = (0, 0)  # without a client: before, and afterwards


async def swap_again_and_again(instance: Instance, watched: Watched, end: float) -> None:
    number = 2
    while time.monotonic() + SWAP_EVERY_S < end:
        began, lag = time.monotonic(), await asyncio.to_thread(read_lag, instance.url)
        code = await asyncio.to_thread(instance.try_to_promote(f"tiny@{number}").wait)
        watched.swaps.append((began, time.monotonic(), code))
        watched.lag += await asyncio.to_thread(read_lag, instance.url) - lag
        number = 3 - number
        await asyncio.sleep(max(0.0, SWAP_EVERY_S - (time.monotonic() - began)))


async def kill_again_and_again(instance: Instance, watched: Watched, tally: Tally, end: float) -> None:
    await asyncio.sleep(KILL_EVERY_S / 2)
    while time.monotonic() + KILL_EVERY_S < end:
        before = (await asyncio.to_thread(instance.status))["engine"]["restarts"]
        (engine,) = instance.engines()
        core = core_of(engine)
        began = time.monotonic()
        kill = Kill(began, tally.running)
        core.kill()
        watched.kills.append(kill)
        await asyncio.to_thread(instance.until, partial(has_restarted, before))
        kill.ready = time.monotonic()
        await asyncio.sleep(max(0.0, KILL_EVERY_S - (time.monotonic() - began)))


def has_restarted(before: int, status: Any) -> bool:
    """Whether an engine was started since, and answers."""
    return bool(status["engine"]["restarts"] > before and status["engine"]["state"] == "ready")


async def sample(instance: Instance, watched: Watched, end: float) -> None:
    process = instance.process()
    await asyncio.sleep(WARM_S)
    while time.monotonic() < end:
        watched.memory.append(process.memory_info().rss)
        await asyncio.sleep(SAMPLE_EVERY_S)


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A server with one engine, and version 1."""
    with closing(Instance(home, tmp_path_factory.mktemp("soak") / "home", PORT, PROMPTS)) as instance:
        instance.start("tiny@1")
        yield instance


@pytest.fixture(scope="module")
def soaked(instance: Instance) -> tuple[Tally, Watched]:
    """The whole of it."""
    expected = {"tiny@1": [text for _, text in instance.answers()]}
    instance.promote("tiny@2")
    expected["tiny@2"] = [text for _, text in instance.answers()]
    instance.promote("tiny@1")
    tally, watched = Tally(expected), Watched()

    async def run() -> None:
        end = time.monotonic() + 60 * MINUTES
        await asyncio.gather(
            Clients(instance.url, PROMPTS, tally).run(60 * MINUTES),
            swap_again_and_again(instance, watched, end),
            kill_again_and_again(instance, watched, tally, end),
            sample(instance, watched, end),
        )

    before = instance.process().num_fds()
    asyncio.run(run())
    time.sleep(REST_S)
    watched.descriptors = (before, instance.process().num_fds())
    return tally, watched


def test_each_answer_is_from_the_version_in_its_header(soaked: tuple[Tally, Watched], report: Report) -> None:
    tally, watched = soaked
    report(
        f"soak, {MINUTES:g} min: {dict(tally.complete)} answers, {len(watched.swaps)} swaps, {len(watched.kills)} kills"
    )
    assert set(tally.complete) == {"tiny@1", "tiny@2"}
    assert tally.mixed == []


def test_errors_are_those_of_the_kills(soaked: tuple[Tally, Watched], report: Report) -> None:
    tally, watched = soaked
    away = [error for error in tally.errors if any(kill.covers(error.ended) for kill in watched.kills)]
    ran = [kill.running for kill in watched.kills]
    codes = Counter(error.code for error in away)
    report(f"while an engine was away: {dict(codes)}; requests that ran when it was killed: {ran}")
    assert [error for error in tally.errors if error not in away] == []


def test_no_request_goes_to_an_engine_that_was_seen_dead(soaked: tuple[Tally, Watched]) -> None:
    """A killed engine cuts off what ran in it, and what came before the first of these errors."""
    tally, watched = soaked
    for kill in watched.kills:
        cut_off = [one for one in tally.errors if kill.covers(one.ended) and one.code != "engine_unavailable"]
        seen = min((one.ended for one in cut_off), default=kill.at)
        assert [one for one in cut_off if one.began > seen + SEEN_S] == []


def test_swaps_succeed_but_for_those_whose_engine_was_killed(soaked: tuple[Tally, Watched], report: Report) -> None:
    _, watched = soaked
    report(f"swaps by exit code: {dict(Counter(code for *_, code in watched.swaps))}")
    failed = [
        swap
        for swap in watched.swaps
        if swap[2] and not any(kill.at < swap[1] and swap[0] < kill.ready for kill in watched.kills)
    ]
    assert failed == []


def test_bad_clients_are_told_so(soaked: tuple[Tally, Watched], report: Report) -> None:
    tally, _ = soaked
    report(f"wrong requests: {dict(tally.refused)}; slow ones: {dict(tally.slow)}; feedback: {dict(tally.feedback)}")
    assert set(tally.refused) <= {400, 404, 405, 413, 415, 422, 503}
    assert tally.slow["sent slowly: 408"] > 0
    assert tally.slow["read slowly: whole"] > 0
    assert tally.slow["read nothing: whole"] == 0


def test_memory_and_descriptors_stay_flat(soaked: tuple[Tally, Watched], report: Report) -> None:
    _, watched = soaked
    first, last = thirds([float(one) for one in watched.memory])
    before, afterwards = watched.descriptors
    report(f"memory {fmean(first) / 2**20:.1f} -> {fmean(last) / 2**20:.1f} MiB")
    report(f"descriptors without clients {before} -> {afterwards}")
    assert fmean(last) <= 1.05 * fmean(first)
    assert afterwards <= before + 2


def test_the_event_loop_is_watched(instance: Instance, soaked: tuple[Tally, Watched], report: Report) -> None:
    _, watched = soaked
    whole = read_lag(instance.url)
    report(lag_figure("inplace", watched.lag))
    report(lag_figure("the whole soak", whole))
    assert whole[float("inf")] > 60 * MINUTES * 10  # fifty a second are asked for


def thirds(values: list[float]) -> tuple[list[float], list[float]]:
    """The first and the last."""
    size = len(values) // 3
    return values[:size], values[-size:]
