"""Soak test on the real engine: models are promoted, killed and idle, with good and hostile clients.

`make soak` runs it for ten minutes or for MINUTES; the figures in docs/reliability.md are from a run of
thirty minutes.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import psutil
import pytest

from examples.service import svc_json
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.hostile import HostileClients
from tests.e2e.instance import Instance, copy_model, core_of, group
from tests.e2e.lag import lag_figure, lag_ms, read_lag
from tests.e2e.soak import Clients, Tally

pytestmark = [pytest.mark.soak]

PORT, IDLE_PORT = 8946, 8945
MINUTES = float(os.environ.get("MINUTES", "10"))
TINY, OTHER = "tiny", "other"
SWAP_EVERY_S = 30.0
OTHER_SWAP_EVERY_S = 70.0
SAMPLE_EVERY_S = 2.0
WARM_S = min(300.0, 60 * MINUTES / 4)
"""Warm-up seconds: caches fill, late imports happen, and the watched engine is killed for the last time."""
CYCLE_S, PAUSE_S, IDLE_S = 150.0, 50.0, 15.0
"""Cycle length, request-free pause at its end, and idle time of the second model, in seconds."""
REST_S = 20.0
"""Rest time in seconds. Connections that were closed but not read end after fifteen seconds."""
SEEN_S = 0.1
"""Seconds allowed between an error in the server and its client noticing it, on two shared CPUs."""
MOST_MEMORY_GROWTH = 1.05
MOST_LAG_MS = 10.0
MOST_STORE_DESCRIPTORS = 2 * 15 + 1
"""File limit of SQLAlchemy's pool: up to 15 open connections with two files each, plus one shared file."""
"""Of the 99th percentile beyond that of a gateway that nobody asks."""
_FAR = 1e12


@dataclass
class Kill:
    """An engine that was killed.

    Attributes:
        model: model that the engine served.
        at, ready: monotonic times in seconds.
        running: number of well-behaved clients' requests running at the time.
    """

    model: str
    at: float
    running: int
    ready: float = _FAR

    def covers(self, model: str, when: float) -> bool:
        """Return whether a model's engine was down at a time, within 0.5 s because clients may notice first."""
        return model == self.model and self.at - 0.5 <= when <= self.ready + 0.5


@dataclass
class Swap:
    """One promotion, with its start, end and exit code."""

    model: str
    began: float
    ended: float
    code: int


class Descriptors(NamedTuple):
    """Open descriptors of a process: files of the store, which grow with concurrent requests, and all others."""

    store: int
    other: int


@dataclass
class Watched:
    """Events of the soak test and the server's resource usage."""

    kills: list[Kill] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    wakes: int = 0
    lag: Counter[float] = field(default_factory=Counter)
    idle_lag: Counter[float] = field(default_factory=Counter)
    """Event loop lag of a gateway without requests, on the same machine at the same time."""
    memory: list[float] = field(default_factory=list)
    engine_memory: list[tuple[int, float]] = field(default_factory=list)
    """Samples of the engine's memory in bytes, each with the id of the engine's first process."""
    descriptors: tuple[Descriptors, Descriptors] | None = None  # without a client: before, and afterwards


class Soak:
    """The soak test of one server."""

    def __init__(self, instance: Instance, idle: Instance, tally: Tally, hostile_key: str) -> None:
        self.instance = instance
        self.idle = idle
        self.tally = tally
        self.watched = Watched()
        self._began = time.monotonic()
        self._end = self._began + 60 * MINUTES
        self.hostile = HostileClients(instance.url, _bearer(hostile_key), PROMPTS[0], self._models)

    async def run(self) -> None:
        """Run the complete soak test."""
        before = [await asyncio.to_thread(read_lag, each.url, each.headers) for each in (self.instance, self.idle)]
        clients = Clients(self.instance.url, PROMPTS, self.tally, self.instance.headers, self._models)
        loop_end = asyncio.get_running_loop().time() + 60 * MINUTES
        await asyncio.gather(
            clients.run(60 * MINUTES),
            self.hostile.run(loop_end),
            self._promote(TINY, "merged", SWAP_EVERY_S),
            self._promote(OTHER, "adapter", OTHER_SWAP_EVERY_S),
            self._kill(TINY, (0.25, 0.6)),
            self._kill(OTHER, [0.4 + 0.8 * number for number in range(int(60 * MINUTES / WARM_S))]),
            self._sample(),
        )
        lags = [await asyncio.to_thread(read_lag, each.url, each.headers) for each in (self.instance, self.idle)]
        self.watched.lag, self.watched.idle_lag = lags[0] - before[0], lags[1] - before[1]

    def _models(self) -> Sequence[str]:
        """Return the model names to request now."""
        busy = (time.monotonic() - self._began) % CYCLE_S < CYCLE_S - PAUSE_S
        return (TINY, TINY, OTHER, f"{OTHER}@1", f"{OTHER}@2") if busy else (TINY,)

    async def _promote(self, model: str, format: str, every_s: float) -> None:
        number = 2
        while (began := time.monotonic()) + every_s < self._end:
            promoting = self.instance.try_to_promote(f"{model}@{number}", "--format", format)
            code = await asyncio.to_thread(promoting.wait)
            self.watched.swaps.append(Swap(model, began, time.monotonic(), code))
            number = 3 - number
            await asyncio.sleep(max(0.0, every_s - (time.monotonic() - began)))

    async def _kill(self, model: str, shares: Sequence[float]) -> None:
        """Kill a model's engine at the given fractions of the warm-up time."""
        for share in shares:
            await asyncio.sleep(max(0.0, self._began + share * WARM_S - time.monotonic()))
            if time.monotonic() + 90 > self._end:
                return
            with suppress(StopIteration, psutil.NoSuchProcess):
                state = (await asyncio.to_thread(self.instance.models))[model]["engine"]
                if state["state"] != "ready":
                    continue
                (engine,) = await asyncio.to_thread(self.instance.engines_of, model)
                core = core_of(engine)
                kill = Kill(model, time.monotonic(), self.tally.running[model])
                core.kill()
                self.watched.kills.append(kill)
                await asyncio.to_thread(self._until_restarted, model, engine.pid)
                kill.ready = time.monotonic()

    def _until_restarted(self, model: str, killed: int) -> None:
        """Wait until another engine answers or no engine is needed any more."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            state = self.instance.models()[model]["engine"]["state"]
            others = [engine for engine in self.instance.engines_of(model) if engine.pid != killed]
            if state == "idle" or (state == "ready" and others):
                return
            time.sleep(0.2)
        raise AssertionError(f"{model} did not come back")

    async def _sample(self) -> None:
        process, asleep = self.instance.process(), False
        while time.monotonic() < self._end:
            state = (await asyncio.to_thread(self.instance.models))[OTHER]["engine"]["state"]
            self.watched.wakes += asleep and state != "idle"
            asleep = state == "idle"
            if time.monotonic() > self._began + WARM_S:
                self.watched.memory.append(process.memory_info().rss)
                with suppress(psutil.Error, ValueError):
                    (engine,) = await asyncio.to_thread(self.instance.engines_of, TINY)
                    size = sum(each.memory_full_info().pss for each in group(engine))
                    self.watched.engine_memory.append((engine.pid, size))
            await asyncio.sleep(SAMPLE_EVERY_S)


@pytest.fixture(scope="module")
def soak_home(workplace: Path) -> Path:
    """Return a home with two versions that can be served merged and as adapters."""
    home, recipe = workplace / "soak-home", str(workplace / "recipe.yaml")
    common = ["--set", "formats=[adapter, merged]", "--set", "qualify.restart=false"]
    svc_json(home, "train", recipe, *common)
    svc_json(home, "train", recipe, *common, "--set", "train.seed=1")
    return home


@pytest.fixture(scope="module")
def instance(soak_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server with two models, one of which idles."""
    settings = {
        "SVC_MODELS": f'{{"{OTHER}": {{"idle_s": {IDLE_S}}}}}',
        "SVC_SERVE__MAX_CONNECTIONS_PER_ADDRESS": "90",
    }
    folder = tmp_path_factory.mktemp("soak") / "home"
    with closing(Instance(soak_home, folder, PORT, PROMPTS, **settings)) as instance:
        copy_model(instance.home, OTHER)
        key = svc_json(instance.home, "keys", "create", "--name", "good", "--scope", "admin", "--weight", "10")
        instance.headers = _bearer(key["secret"])
        instance.start(f"{TINY}@1", f"{OTHER}@1")
        instance.until_all(lambda state: state in ("ready", "idle"))
        instance.promote(f"{OTHER}@1", "--format", "adapter")
        yield instance


@pytest.fixture(scope="module")
def idle(soak_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a gateway that has no requests and no engine."""
    folder = tmp_path_factory.mktemp("idle") / "home"
    with closing(Instance(soak_home, folder, IDLE_PORT, PROMPTS, SVC_SERVE__IDLE_S="1")) as idle:
        idle.start(f"{TINY}@1")
        idle.until(lambda status: status["engine"]["state"] == "idle")
        yield idle


@pytest.fixture(scope="module")
def soaked(idle: Instance, instance: Instance) -> Soak:
    """Run the soak test and return its record."""
    key = svc_json(instance.home, "keys", "create", "--name", "hostile")
    expected = {f"{TINY}@1": [text for _, text in instance.answers(TINY)]}
    instance.promote(f"{TINY}@2", "--format", "merged")
    expected[f"{TINY}@2"] = [text for _, text in instance.answers(TINY)]
    instance.promote(f"{TINY}@1", "--format", "merged")
    expected |= {name: [text for _, text in instance.answers(name)] for name in (f"{OTHER}@1", f"{OTHER}@2")}
    soak = Soak(instance, idle, Tally(expected), key["secret"])
    before = _descriptors(instance)
    asyncio.run(soak.run())
    time.sleep(REST_S)
    soak.watched.descriptors = (before, _descriptors(instance))
    return soak


def _descriptors(instance: Instance) -> Descriptors:
    process = instance.process()
    store = sum(Path(file.path).name.startswith("svc.db") for file in process.open_files())
    return Descriptors(store, process.num_fds() - store)


def test_each_answer_comes_from_the_version_in_its_header(soaked: Soak, report: Report) -> None:
    tally, watched = soaked.tally, soaked.watched
    kills = Counter(kill.model for kill in watched.kills)
    report(f"soak, {MINUTES:g} min: {dict(tally.complete)} answers, {watched.wakes} wakes, kills {dict(kills)}")
    assert set(tally.complete) == set(tally.expected)
    assert tally.mixed == []
    assert watched.wakes > 0


def test_only_requests_on_a_killed_engine_fail(soaked: Soak, report: Report) -> None:
    errors, kills = soaked.tally.errors, soaked.watched.kills
    away = [error for error in errors if any(kill.covers(error.model, error.ended) for kill in kills)]
    codes = Counter(f"{error.model} {error.code}" for error in away)
    ran = [(kill.model, kill.running) for kill in kills]
    report(f"while an engine was away: {dict(codes)}; requests that ran when it was killed: {ran}")
    assert [error for error in errors if error not in away] == []


def test_no_request_is_sent_to_a_known_dead_engine(soaked: Soak) -> None:
    """A killed engine fails its running requests and those that arrive before the first of these errors."""
    for kill in soaked.watched.kills:
        errors = [one for one in soaked.tally.errors if kill.covers(one.model, one.ended)]
        cut_off = [one for one in errors if one.code != "engine_unavailable"]
        seen = min((one.ended for one in cut_off), default=kill.at)
        assert [one for one in cut_off if one.began > seen + SEEN_S] == []


def test_swaps_succeed_unless_their_engine_is_killed(soaked: Soak, report: Report) -> None:
    watched = soaked.watched
    report(f"swaps by exit code: {dict(Counter(f'{swap.model} {swap.code}' for swap in watched.swaps))}")
    failed = [
        swap
        for swap in watched.swaps
        if swap.code
        and not any(
            kill.model == swap.model and kill.at < swap.ended and swap.began < kill.ready for kill in watched.kills
        )
    ]
    assert failed == []


def test_invalid_client_requests_get_client_errors(soaked: Soak, report: Report) -> None:
    tally = soaked.tally
    report(f"wrong requests: {dict(tally.refused)}; slow ones: {dict(tally.slow)}; feedback: {dict(tally.feedback)}")
    assert set(tally.refused) <= {400, 404, 405, 413, 415, 422, 503}
    assert tally.slow["sent slowly: 408"] > 0
    assert tally.slow["read slowly: whole"] > 0
    assert tally.slow["read nothing: whole"] == 0


def test_hostile_clients_get_an_answer_or_a_rejection(soaked: Soak, report: Report) -> None:
    seen = soaked.hostile.seen
    report(f"hostile clients: {dict(sorted(seen.items()))}")
    assert seen["too much: 400"] > 0
    assert seen["say that the engine is dead: 400"] > 0
    assert seen["offer another protocol: 200"] > 0
    assert seen["offer a websocket: 405"] > 0
    assert seen["hog connections: some refused"] > 0
    assert seen["hog connections: none refused"] == 0
    assert not [name for name in seen if name.endswith(("500", "502"))]


def test_memory_and_file_descriptors_stay_flat_over_time(soaked: Soak, report: Report) -> None:
    watched = soaked.watched
    (engine,) = {pid for pid, _ in watched.engine_memory}  # in place: one process after the last kill
    assert watched.descriptors
    before, afterwards = watched.descriptors
    for title, values in (("gateway", watched.memory), ("engine", [size for _, size in watched.engine_memory])):
        first, last = thirds(values)
        report(f"memory of the {title} {fmean(first) / 2**20:.1f} -> {fmean(last) / 2**20:.1f} MiB")
        assert fmean(last) <= MOST_MEMORY_GROWTH * fmean(first)
    report(f"descriptors without clients {before} -> {afterwards}; process {engine}")
    assert afterwards.other <= before.other + 2
    assert afterwards.store <= MOST_STORE_DESCRIPTORS


def test_event_loop_lag_under_load_stays_close_to_the_lag_of_an_idle_gateway(soaked: Soak, report: Report) -> None:
    watched = soaked.watched
    report(lag_figure("busy gateway", watched.lag))
    report(lag_figure("idle gateway beside it", watched.idle_lag))
    busy, idle = lag_ms(watched.lag, 0.99), lag_ms(watched.idle_lag, 0.99)
    report(f"99th percentile, interpolated: {busy:.1f} and {idle:.1f} ms")
    assert watched.lag[float("inf")] > 60 * MINUTES * 5  # ten per second are requested
    assert busy <= idle + MOST_LAG_MS


def _bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def thirds(values: list[float]) -> tuple[list[float], list[float]]:
    """Return the first and last third of the values."""
    size = len(values) // 3
    return values[:size], values[-size:]
