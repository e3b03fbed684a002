"""A job of the fine-tuning API is trained on a real Ray cluster."""

from pathlib import Path

import pytest

from serving.server.assembly import make_job_worker
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.registry.registry import Registry
from svc.settings.client_apis import FineTuningSettings
from svc.settings.settings import Settings
from svc.store.statuses import JobStatus
from svc.version import Format
from tests.new_store import new_store
from tests.ray_cluster import running_cluster
from tests.serving.fine_tuning.worker_home import WorkerHome, add_real_job
from tests.trainer.tiny_model import examples, tiny_base

__all__ = ["examples", "tiny_base"]


@pytest.mark.slow
@pytest.mark.matrix
async def test_job_is_trained_on_a_ray_node_when_the_server_is_configured_for_ray(
    tmp_path: Path, tiny_base: Path, examples: list[ChatExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    home = WorkerHome(new_store(tmp_path / "home"), tmp_path / "home")
    write_examples(home.files.path(home.file), examples)
    id = add_real_job(home, tiny_base, epochs=1)
    (tmp_path / "store").mkdir()
    with running_cluster("first") as nodes:
        settings = Settings(
            home=home.settings.home,
            fine_tuning=FineTuningSettings(bases={"small": str(tiny_base)}, place="ray"),
            artifacts={"url": (tmp_path / "store").as_uri()},
            ray={"address": nodes.address, "folder": tmp_path / "nodes"},
        )
        worker = make_job_worker(settings, Registry.of(settings), home.store, home.files, home.changes)
        assert worker is not None
        async with home.working(worker):
            await home.ended(id)
    job, log = home.job(id), (home.job_folder(id) / "log").read_text()
    assert job.status is JobStatus.SUCCEEDED, log
    assert job.version is not None
    assert f"Ray at {nodes.address}: 1 x 1 CPU free" in log
    assert any("training loss=" in message for message in home.messages(id))
    Registry.of(settings).verify(job.version, Format.ADAPTER)
