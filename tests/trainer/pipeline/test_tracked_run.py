"""Tests that a training neither stops nor waits while a real MLflow tracking server is down."""

import time
from collections.abc import Iterable, Mapping

import pytest
from mlflow import MlflowClient

from svc.errors import RegistryError
from svc.registry.tracking import Tracking
from tests.tracking_server import UNREACHABLE, TrackingServer
from trainer.pipeline.tracked_run import sending_curve

pytestmark = pytest.mark.slow


def test_tracked_training_curve_is_complete_after_a_tracking_server_outage(
    tracking_server: TrackingServer,
) -> None:
    tracking = Tracking(tracking_server.url)
    run = tracking.start_run("teams", {})
    with tracking.attach(run), sending_curve(tracking, run) as send:
        send(1, {"loss": 3.0})
        with tracking_server.stopped():
            began = time.monotonic()
            for step in range(2, 7):
                send(step, {"loss": 3.0 / step})
            assert time.monotonic() - began < 1  # the training does not wait
        send(7, {"loss": 0.1})
    history = MlflowClient(tracking_server.url).get_metric_history(run, "loss")
    assert sorted({point.step for point in history}) == [1, 2, 3, 4, 5, 6, 7]


def test_training_completes_normally_if_the_tracking_server_stays_down(capsys: pytest.CaptureFixture[str]) -> None:
    tracking = Tracking(UNREACHABLE)
    with tracking.attach("abc"), sending_curve(tracking, "abc") as send:
        send(1, {"loss": 3.0})
    assert f"steps whose metrics are missing from MLflow at {UNREACHABLE}: 1" in capsys.readouterr().err


def test_training_run_is_not_delayed_when_the_tracking_server_fails_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracking, attempts = Tracking(UNREACHABLE), []

    def fail_slowly(run_id: str, points: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        attempts.append(run_id)
        time.sleep(0.1)
        raise RegistryError("MLflow is not responding")

    monkeypatch.setattr(tracking, "log_points", fail_slowly)
    with sending_curve(tracking, "abc") as send:
        for step in range(100):
            send(step, {"loss": 3.0})
    assert len(attempts) <= 3
