"""Tests how trials on a cluster run at the same time, stop, and fail. Ray is left out."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import pytest

from svc.errors import InterruptedRunError
from svc.settings.settings import Settings
from tests.trainer.conftest import make_recipe
from tests.trainer.sweep.fake_trials import outcome
from trainer.base_model.resolve import Base
from trainer.sweep import ray_trials
from trainer.sweep.outcome import TrialOutcome
from trainer.sweep.ray_trials import RayTrials
from trainer.training.parallel.ray_processes import ClusterError

NODES = 3
ENDS_S = 20.0


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the cluster by one of three nodes with a CPU each, on which nothing runs."""
    nodes = [{"Alive": True, "Resources": {"CPU": 1.0}}] * NODES
    monkeypatch.setattr(ray_trials, "connected", lambda address: nullcontext())
    monkeypatch.setattr(ray_trials, "share_base", lambda *_: "base")
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    for name in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(f"ray.{name}", lambda: {"CPU": float(NODES)})


def make_trials(limit: int | None = None) -> RayTrials:
    settings = Settings.model_validate({"artifacts": {"url": "s3://bucket"}, "ray": {"address": "head:6379"}})
    return RayTrials(settings, make_recipe(), Base(Path("base"), "./base", None, "sha256:0"), limit)


class Trials:
    """Trials that finish when they are told to.

    Attributes:
        most: largest number of trials that were running at the same time.
    """

    def __init__(self, place: RayTrials) -> None:
        self._place = place
        self._may_finish = threading.Event()
        self._lock = threading.Lock()
        self._running = self.most = 0

    def start(self) -> "Future[TrialOutcome]":
        return self._place.start(self._train)

    def _train(self) -> TrialOutcome:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        asked = self._place._session.asked
        while not self._may_finish.wait(0.01):
            if asked.by is not None:
                raise InterruptedRunError(f"stopped by {asked.by.name}, with a checkpoint")
        with self._lock:
            self._running -= 1
        return outcome(0.0)

    def wait_until_running(self, count: int) -> None:
        deadline = time.monotonic() + ENDS_S
        while self._running < count and time.monotonic() < deadline:
            time.sleep(0.01)

    def finish(self) -> None:
        self._may_finish.set()


@pytest.mark.parametrize(("limit", "expected"), [(None, NODES), (2, 2)])
def test_number_of_parallel_trials_is_limited_by_cluster_capacity_and_the_parallel_option(
    limit: int | None, expected: int
) -> None:
    place = make_trials(limit)
    with place.joined() as parallel:
        assert parallel == expected
        trials = Trials(place)
        results = [trials.start() for _ in range(5)]
        trials.wait_until_running(expected)
        trials.finish()
        assert all(result.result().loss for result in results)
    assert trials.most == expected


def search(place: RayTrials, work: Callable[[Trials], object]) -> None:
    with place.joined():
        work(Trials(place))


def test_all_trials_stop_when_a_signal_arrives() -> None:
    results = list[Future[TrialOutcome]]()

    def work(trials: Trials) -> None:
        results.extend(trials.start() for _ in range(4))
        trials.wait_until_running(NODES)
        os.kill(os.getpid(), signal.SIGINT)
        results[0].result()

    with pytest.raises(InterruptedRunError, match="stopped by SIGINT, with a checkpoint"):
        search(make_trials(), work)
    assert all(result.cancelled() or isinstance(result.exception(), InterruptedRunError) for result in results)


def test_no_trial_starts_after_a_signal() -> None:
    def work(trials: Trials) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        trials.start()

    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM between two trials"):
        search(make_trials(), work)


def test_sweep_is_interrupted_when_a_signal_arrives_after_the_last_trial() -> None:
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM after all trials had ended"):
        search(make_trials(), lambda trials: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize("fails", ["cluster", "search"])
def test_running_trials_save_checkpoints_and_stop_when_the_cluster_or_search_fails(fails: str) -> None:
    place, running = make_trials(), list[Future[TrialOutcome]]()

    def fail() -> TrialOutcome:
        raise ClusterError("it failed")

    def work(trials: Trials) -> None:
        running.append(trials.start())
        trials.wait_until_running(1)
        if fails == "cluster":
            place.start(fail)
            running[0].result()
        fail()

    with pytest.raises(ClusterError, match="it failed"):
        search(place, work)
    assert isinstance(running[0].exception(), InterruptedRunError)
