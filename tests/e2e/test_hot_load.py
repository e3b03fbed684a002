"""Tests rolling and blue-green swaps, and adoption by the next server, with real engines under load."""

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from examples.load import Load
from svc.engine.orphans import runs
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance, figures
from tests.e2e.lag import lag_figure, read_lag

pytestmark = [pytest.mark.slow]

PORT = 8944


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server with two engines and version 1 in production."""
    folder = tmp_path_factory.mktemp("hot-load") / "home"
    with closing(Instance(home, folder, PORT, PROMPTS, SVC_ENGINE__REPLICAS="2")) as instance:
        instance.start("tiny@1")
        instance.until(lambda status: [engine["state"] for engine in status["engines"]] == ["ready", "ready"])
        yield instance


def test_rolling_swap_under_load_neither_delays_requests_nor_mixes_up_answers(
    instance: Instance, report: Report
) -> None:
    """Needs the real engine: weights are reloaded in place, and an answer of mixed weights would be text of neither."""
    expected = {"tiny@1": instance.answers()}
    with Load(instance.url, "tiny", instance.prompts) as load:
        load.wait_for(16)
        before = read_lag(instance.url)
        swap = instance.promote("tiny@2")
        report(lag_figure("rolling", read_lag(instance.url) - before))
        load.wait_for(16)
    expected["tiny@2"] = instance.answers()
    report(figures(load, swap))
    assert (swap["kind"], swap["queued"], load.failed) == ("rolling", None, [])
    assert {answer.version for answer in load.answers} == {"tiny@1", "tiny@2"}
    for answer in load.answers:
        assert (answer.version, answer.text) == expected[answer.version][answer.prompt]


def test_killed_server_adopts_both_engines_when_it_restarts(instance: Instance, report: Report) -> None:
    """Needs the real engine: its processes must outlive their parent, and go on answering over their sockets."""
    before, engines = instance.answers(), instance.engines()
    assert instance.end(signal.SIGKILL) == -signal.SIGKILL
    ready_s = instance.start()
    report(f"a killed server is ready again after {ready_s:.1f} s")
    instance.until(lambda status: [engine["state"] for engine in status["engines"]] == ["ready", "ready"])
    assert instance.engines() == engines
    assert instance.answers() == before


def test_blue_green_swap_under_load_delays_no_request(instance: Instance, report: Report) -> None:
    """The format changes, and with it the kernels, so the answers may differ and only need to be complete.

    Needs the real engine: four engines are in memory at once, and only a real start takes seconds of all cores.
    """
    old = instance.engines()
    # Without pauses, the load takes most of the CPU time, and two engines take five times as long to start.
    with Load(instance.url, "tiny", instance.prompts, streams=2, pause_s=0.5) as load:
        load.wait_for(4)
        before = read_lag(instance.url)
        swap = instance.promote("tiny@2", "--format", "merged")
        report(lag_figure("bluegreen", read_lag(instance.url) - before))
        load.wait_for(4)
    report(figures(load, swap))
    assert (swap["kind"], swap["queued"], load.failed) == ("bluegreen", None, [])
    instance.until(lambda status: len(status["engines"]) == 2)
    assert not set(old) & set(instance.engines())


def test_stopping_the_server_stops_all_engines(instance: Instance) -> None:
    engines = instance.engines()
    assert instance.end(signal.SIGTERM) == 0
    assert not any(runs(engine) for engine in engines)
    assert instance.engines() == []
