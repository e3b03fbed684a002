"""Tests that features of a bounded sample of requests are stored by a process that restarts after a crash."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from serving.telemetry import drift_features
from serving.telemetry.drift_features import BURST, PER_DAY, FeatureProcess
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.store.drift_items import item_ids, read_items
from svc.store.requests import RequestRecord, add_requests
from svc.version import Format, Target, VersionId
from tests.builders.clocks import Clock
from tests.builders.requests import RECORD as OLD_RECORD
from tests.new_store import new_store
from tests.serving.versions import NAME, AliasBook, make_version, target

PATIENCE_S = 300.0
ONE = target(1)
PROMPT = '[{"role": "user", "content": "Where is Featherstonehaugh?"}]'
RECORD = OLD_RECORD._replace(
    model=NAME, version=ONE.version, format=ONE.format, prompt=PROMPT, answer="Cholmondeley", temperature=0.0
)


class Features:
    """A feature process for a home whose version 1 has a drift reference, and the number of lost requests."""

    def __init__(self, home: Path) -> None:
        self.store = new_store(home)
        self.registry = Registry(home / "models", AliasBook())
        make_version(self.registry, 1, compared=True, answered=3, formats=(Format.MERGED, Format.GPTQ))
        self.lost = 0
        self.process = FeatureProcess(Settings(home=home), on_dropped=self._lose)
        self.asked = 0

    def _lose(self, count: int) -> None:
        self.lost += count

    def records(self, count: int = 1, of: Target = ONE) -> list[RequestRecord]:
        """Return requests whose rows are already in the store."""
        ids = [f"req-{number}" for number in range(self.asked, self.asked + count)]
        self.asked += count
        records = [RECORD._replace(request_id=id, version=of.version, format=of.format) for id in ids]
        add_requests(self.store, [record._replace(prompt=None, answer=None) for record in records])
        return records

    def add(self, count: int = 1, of: Target = ONE) -> None:
        """Add requests whose features should be stored."""
        self.process.add(self.records(count, of))

    def stored(self, count: int, of: Target = ONE) -> None:
        """Wait until the store contains the given number of feature items."""
        until(lambda: len(item_ids(self.store, of)) >= count)
        assert len(item_ids(self.store, of)) == count


def until(met: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children() -> list[psutil.Process]:
    """Return the running feature processes."""
    return [psutil.Process(child.pid) for child in multiprocessing.active_children()]


@contextmanager
def running(home: Path) -> Iterator[Features]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift_features, "_GATHER_S", 0.01)
        patch.setattr(drift_features, "_PAUSE_S", 0.0)
        features = Features(home)
        yield features
        features.process.close(0)
    assert children() == []


@pytest.fixture
def features(tmp_path: Path) -> Iterator[Features]:
    with running(tmp_path) as features:
        yield features


@pytest.mark.slow
def test_feature_rate_limit_allows_an_initial_burst_and_then_the_daily_rate(tmp_path: Path) -> None:
    clock = Clock()
    process = FeatureProcess(Settings(home=tmp_path), on_dropped=print, clock=clock)
    assert sum(process.wants(ONE) for _ in range(BURST + 500)) == BURST
    taken = 0
    for _ in range(24 * 60):
        clock.now += 60
        taken += sum(process.wants(ONE) for _ in range(20))
    assert taken == pytest.approx(PER_DAY, abs=1)
    clock.now += 7 * 86_400
    assert sum(process.wants(ONE) for _ in range(2 * BURST)) == BURST


def test_each_version_has_its_own_rate_limit_for_feature_computations(tmp_path: Path) -> None:
    process = FeatureProcess(Settings(home=tmp_path), on_dropped=print, clock=Clock())
    assert sum(process.wants(ONE) for _ in range(2 * BURST)) == BURST
    assert process.wants(target(2))
    assert process.wants(target(1, Format.GPTQ))


@pytest.mark.slow
class TestOneProcess:
    """Tests that share one process, because starting one takes seconds. Each test has its own version."""

    @pytest.fixture(scope="class")
    def home(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("home")

    @pytest.fixture(scope="class")
    def features(self, home: Path) -> Iterator[Features]:
        with running(home) as features:
            yield features

    def test_features_are_stored_in_request_order_and_no_text_is_written(self, features: Features, home: Path) -> None:
        records = features.records(250)
        features.process.add(records)
        features.stored(250)
        (process,) = children()
        assert process.nice() == 10
        items = [row.item for row in read_items(features.store, ONE, after=0, newest=999)]
        assert [item.request_id for item in items] == [record.request_id for record in records]
        assert items[0].prompt["characters"] == len("Where is Featherstonehaugh?")
        assert items[0].answer["answer_tokens"] == 3  # the length limit of held-out answers
        assert items[0].topic.shape == items[1].topic.shape
        features.add(1, target(1, Format.GPTQ))
        features.stored(1, target(1, Format.GPTQ))
        assert children() == [process]
        assert features.lost == 0
        content = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
        assert b"Featherstonehaugh" not in content
        assert b"Cholmondeley" not in content

    def test_damaged_text_embedding_file_stops_feature_computation_for_that_version_only(
        self, features: Features
    ) -> None:
        for number in (2, 3):
            make_version(features.registry, number, compared=True)
        (space,) = (features.registry.folder(VersionId(NAME, 2)) / "reference").glob("text_space.npz")
        space.chmod(0o600)
        space.write_bytes(b"damaged")
        features.add(of=target(2))
        until(lambda: not features.process.wants(target(2)))
        features.add(of=target(3))
        features.stored(1, target(3))

    def test_request_deleted_during_feature_computation_gets_no_stored_features(self, features: Features) -> None:
        four = target(4)
        make_version(features.registry, 4, compared=True)
        records = features.records(1, four)
        features.process.add([records[0]._replace(request_id="forgotten"), *records])
        features.stored(1, four)
        (item,) = read_items(features.store, four, after=0, newest=9)
        assert item.item.request_id == records[0].request_id


@pytest.mark.slow
def test_every_request_is_stored_once_even_if_the_feature_process_is_killed(features: Features) -> None:
    features.add()
    features.stored(1)
    (first,) = children()
    first.kill()
    features.add(3)
    features.stored(4)
    (second,) = children()
    assert second != first
    features.add(1)  # a batch is stored after the reply to the one before, which the first kill already cost an attempt
    features.stored(5)
    second.suspend()
    features.add(3)
    time.sleep(0.5)
    second.kill()
    features.stored(8)
    assert features.lost == 0


def die(connection: Connection, settings: Settings) -> None:
    """A feature process that exits as soon as a batch arrives."""
    connection.recv()
    os._exit(3)


def hang(connection: Connection, settings: Settings) -> None:
    """A feature process that never responds, not even to a request to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(PATIENCE_S)


@pytest.mark.slow
def test_feature_batch_is_counted_as_lost_when_two_feature_processes_die_or_hang(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(drift_features, "_work", die)
        features.add(3)
        until(lambda: features.lost == 3)
        patch.setattr(drift_features, "_work", hang)
        patch.setattr(drift_features, "_ANSWER_TIMEOUT_S", 0.2)
        features.add(2)
        until(lambda: features.lost == 5)
    features.add(2)
    features.stored(2)
    assert len(children()) == 1


@pytest.mark.slow
def test_closing_the_feature_process_stores_the_features_of_queued_requests(features: Features) -> None:
    features.add(5)
    features.process.close(PATIENCE_S)
    assert len(item_ids(features.store, ONE)) == 5
    assert children() == []
    assert features.lost == 0


@pytest.mark.slow
def test_closing_a_hanging_feature_process_stops_it_and_counts_its_records_as_lost(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_features, "_work", hang)
    features.add(120)
    until(children)
    features.process.close(0.1)
    assert children() == []
    assert features.lost == 120


def test_no_feature_process_is_started_for_a_version_without_a_text_embedding_file(features: Features) -> None:
    make_version(features.registry, 2)
    without = [target(2), Target(VersionId("gone", 1), Format.MERGED)]
    assert all(map(features.process.wants, without))
    for each in without:
        features.add(of=each)
    until(lambda: not any(map(features.process.wants, without)))
    assert features.process.wants(ONE)
    assert (children(), features.lost) == ([], 0)


def test_requests_beyond_the_feature_queue_capacity_are_dropped_and_counted_without_waiting(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_features, "_GATHER_S", 30.0)
    monkeypatch.setattr(drift_features, "MAX_QUEUED", 3)
    records = features.records(5)
    began = time.monotonic()
    features.process.add(records)
    assert time.monotonic() - began < 0.5
    assert features.lost == 2
    monkeypatch.setattr(drift_features, "MAX_QUEUED", 99)
    monkeypatch.setattr(drift_features, "MAX_QUEUED_BYTES", 3 * records[0].bytes)
    features.process.add(records)
    assert features.lost == 7


def test_full_queue_accepts_requests_again_after_it_is_emptied(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = target(2)
    make_version(features.registry, 2)  # without a text space, so that no process starts
    records = features.records(3, without)
    monkeypatch.setattr(drift_features, "MAX_QUEUED_BYTES", 3 * records[0].bytes)
    features.process.add(records)
    until(lambda: not features.process.wants(without))
    features.process.add(records)
    assert features.lost == 0
