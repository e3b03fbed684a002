"""Tests that another machine gets the checkpoints of a training from an object store."""

import json
from pathlib import Path

import pytest

from svc.errors import IntegrityError, RegistryError
from svc.registry.objects import ObjectStore
from tests.object_store import Bucket, Fault
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints


class Machine:
    """A machine that trains the run `tiny-1`.

    Attributes:
        checkpoints: its checkpoints, of which it keeps two.
    """

    def __init__(self, folder: Path, bucket: Bucket) -> None:
        folder.mkdir()
        self.tracking = folder / "mlflow.json"
        objects = ObjectStore(bucket.url, retries=0)
        self.shared = SharedCheckpoints(objects, "tiny-1", folder / "checkpoints", self.tracking)
        self.checkpoints = CheckpointFolder(folder / "checkpoints", 2, self.shared.send)

    def write(self, step: int, best: int | None = None) -> None:
        """Write a checkpoint."""
        self.tracking.write_text('{"run_id": "abc"}', "utf-8")
        with self.checkpoints.writing(step, best) as folder:
            (folder / "weights.safetensors").write_bytes(bytes([step]) * 1000)
            (folder / "optimizer.pt").write_bytes(b"optimizer")

    @property
    def steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.checkpoints.folder.glob("step-*"))


@pytest.fixture
def first(tmp_path: Path, bucket: Bucket) -> Machine:
    return Machine(tmp_path / "first", bucket)


@pytest.fixture
def second(tmp_path: Path, bucket: Bucket) -> Machine:
    return Machine(tmp_path / "second", bucket)


@pytest.mark.slow
def test_another_machine_fetches_the_newest_checkpoints_and_the_mlflow_run_id(first: Machine, second: Machine) -> None:
    for step in (1, 2, 3):
        first.write(step)
    assert second.shared.fetch() == "step-00000003"
    assert second.steps == first.steps == [2, 3]
    newest = second.checkpoints.newest()
    assert newest is not None
    assert (newest / "weights.safetensors").read_bytes() == bytes([3]) * 1000
    assert second.tracking.read_text("utf-8") == '{"run_id": "abc"}'


@pytest.mark.slow
def test_best_checkpoint_is_uploaded_regardless_of_its_age(first: Machine, second: Machine) -> None:
    for step in (1, 2, 3, 4):
        first.write(step, best=1)
    second.shared.fetch()
    assert second.steps == [1, 3, 4]


@pytest.mark.slow
def test_newer_checkpoint_on_this_machine_is_kept(tmp_path: Path, first: Machine, bucket: Bucket) -> None:
    first.write(1)
    (tmp_path / "second" / "checkpoints" / "step-00000002").mkdir(parents=True)
    shared = SharedCheckpoints(
        ObjectStore(bucket.url), "tiny-1", tmp_path / "second" / "checkpoints", tmp_path / "second" / "mlflow.json"
    )
    assert shared.fetch() is None


def test_no_checkpoint_is_fetched_from_an_empty_object_store(second: Machine) -> None:
    assert second.shared.fetch() is None


@pytest.mark.slow
def test_checkpoint_whose_upload_failed_is_ignored(first: Machine, second: Machine, bucket: Bucket) -> None:
    first.write(1)
    bucket.fail(Fault.ERROR, "PUT", "step-00000002/weights", times=100)
    first.write(2)  # the training continues
    assert second.shared.fetch() == "step-00000001"


@pytest.mark.slow
def test_checkpoint_uploads_resume_when_the_object_store_is_available_again(
    first: Machine, second: Machine, bucket: Bucket
) -> None:
    bucket.fault = lambda method, path: Fault.ERROR
    first.write(1)
    bucket.fault = lambda method, path: None
    first.write(2)
    assert second.shared.fetch() == "step-00000002"


@pytest.mark.slow
def test_best_checkpoint_is_uploaded_with_a_later_checkpoint_if_its_own_upload_failed(
    first: Machine, second: Machine, bucket: Bucket
) -> None:
    bucket.fault = lambda method, path: Fault.ERROR
    first.write(1, best=1)
    bucket.fault = lambda method, path: None
    for step in (2, 3, 4):
        first.write(step, best=1)
    second.shared.fetch()
    assert second.steps == [1, 3, 4]


@pytest.mark.slow
def test_new_checkpoint_is_uploaded_when_an_earlier_checkpoint_is_damaged(
    first: Machine, second: Machine, bucket: Bucket
) -> None:
    bucket.fault = lambda method, path: Fault.ERROR
    first.write(1)
    bucket.fault = lambda method, path: None
    (first.checkpoints.at(1) / "optimizer.pt").unlink()
    first.write(2)
    second.shared.fetch()
    assert second.steps == [2]


@pytest.mark.slow
def test_altered_checkpoint_is_rejected(first: Machine, second: Machine, bucket: Bucket) -> None:
    first.write(1)
    ObjectStore(bucket.url).write("checkpoints/tiny-1/step-00000001/optimizer.pt", b"optimizes")
    with pytest.raises(IntegrityError, match="was altered"):
        second.shared.fetch()
    assert second.checkpoints.newest() is None


@pytest.mark.slow
def test_checkpoint_with_a_path_outside_its_folder_is_rejected(first: Machine, second: Machine, bucket: Bucket) -> None:
    first.write(1)
    objects, key = ObjectStore(bucket.url), "checkpoints/tiny-1/step-00000001.json"
    records = json.loads(objects.read(key) or b"")
    records[0]["path"] = "../../escaped"
    objects.write(key, json.dumps(records).encode())
    with pytest.raises(IntegrityError, match="lists files in other folders"):
        second.shared.fetch()


def test_training_is_refused_while_the_object_store_is_unavailable(second: Machine, bucket: Bucket) -> None:
    bucket.fault = lambda method, path: Fault.ERROR
    with pytest.raises(RegistryError, match="could not list checkpoints/tiny-1"):
        second.shared.fetch()


@pytest.mark.slow
def test_checkpoints_of_a_registered_run_are_deleted_from_the_object_store(first: Machine, bucket: Bucket) -> None:
    first.write(1)
    first.shared.remove()
    assert ObjectStore(bucket.url).keys("checkpoints") == []
