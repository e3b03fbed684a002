"""A queued job is trained by the real `svc train`, from the queue to the registered version and the result file."""

import csv
import json
from pathlib import Path

import pytest

from serving.fine_tuning.rows import Wanted, read_checkpoints, read_events
from serving.http.page import Page
from serving.models.fine_tuned_rows import find_model
from serving.server.assembly import make_job_worker
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.registry.registry import Registry
from svc.settings.client_apis import FineTuningSettings
from svc.store.statuses import JobStatus
from svc.version import Format
from tests.new_store import new_store
from tests.serving.fine_tuning.worker_home import WorkerHome, add_real_job
from tests.trainer.tiny_model import examples, tiny_base

__all__ = ["examples", "tiny_base"]

EPOCHS = 20
"""Enough for the training to be still running when the first steps are known."""


@pytest.mark.matrix
async def test_paused_and_resumed_job_registers_a_version_with_metrics(
    tmp_path: Path, tiny_base: Path, examples: list[ChatExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    home = WorkerHome(new_store(tmp_path / "home"), tmp_path / "home")
    write_examples(home.files.path(home.file), examples)
    id = add_real_job(home, tiny_base, epochs=EPOCHS)
    settings = home.settings.model_copy(update={"fine_tuning": FineTuningSettings(bases={"small": str(tiny_base)})})
    worker = make_job_worker(settings, Registry.of(settings), home.store, home.files, home.changes)
    assert worker is not None
    async with home.working(worker):
        await home.until(lambda: any("training loss=" in message for message in home.messages(id)))
        home.want(id, Wanted.PAUSE)
        await home.until(lambda: home.job(id).status is not JobStatus.RUNNING)
        home.want(id, Wanted.RUN)
        await home.ended(id)
    job = home.job(id)
    assert job.status is JobStatus.SUCCEEDED, (home.job_folder(id) / "log").read_text()
    assert job.version is not None
    assert job.version in Registry.of(settings).versions("ft-alice-tiny")
    assert "Fine-tuning job paused" in home.messages(id)
    assert job.result_file is not None
    rows = list(csv.DictReader(home.files.path(job.result_file).read_text().splitlines()))
    trained = [int(row["step"]) for row in rows if row["train_loss"]]
    assert trained == list(range(1, len(trained) + 1))
    assert all(0 <= float(row["train_accuracy"]) <= 1 for row in rows if row["train_loss"])
    events, _ = read_events(home.store, id, page=Page(1000))
    assert any("train_mean_token_accuracy" in json.loads(event.data or "{}") for event in events)
    checkpoints, _ = read_checkpoints(home.store, id, page=Page(10))
    assert [each.step for each in checkpoints] == [
        trained[-1] * epoch // EPOCHS for epoch in (EPOCHS, EPOCHS - 1, EPOCHS - 2)
    ]
    assert [each.model == job.fine_tuned_model for each in checkpoints] == [True, False, False]
    for each in checkpoints:
        model = find_model(home.store, each.model)
        assert model is not None
        Registry.of(settings).verify(model.version, Format.ADAPTER)
