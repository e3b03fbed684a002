"""Tests what a worker does on its node. Ray's actor around it is left out: the worker's methods are called directly."""

import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svc.errors import TrainingError
from svc.registry.objects import ObjectStore
from svc.terminal import console
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.parallel.processes import Call, Failure, Place, Result, TrainingFolders
from trainer.training.parallel.ray_worker import TRAINED, RayWorker, Seat, SharedRun, Text
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.parallel.shared_folders import share_base

ALONE = Seat(0, 1, "tcp://127.0.0.1:1", is_terminal=False, width=80)


class _Context:
    def get_node_id(self) -> str:
        return "0123456789abcdef"


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayWorker:
    monkeypatch.setattr("ray.get_runtime_context", _Context)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    for attribute in ("_file", "_width"):  # the properties would be restored to this test's file and width
        monkeypatch.setattr(console, attribute, getattr(console, attribute))
    return RayWorker(tmp_path / "nodes")


@pytest.fixture
def run(tmp_path: Path) -> SharedRun:
    (tmp_path / "store").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes(b"{}")
    url = (tmp_path / "store").as_uri()
    base = share_base(ObjectStore(url), tmp_path / "base", "sha256:" + "a" * 64)
    return SharedRun(url, "tiny-1", base, b"{}", tmp_path / "nodes", "attempt")


def train(worker: RayWorker, run: SharedRun, work: Callable[..., Any], *arguments: Any) -> list[object]:
    """Return the messages of a task, each of whose calls is answered."""
    worker.prepare(run)
    task = pickle.dumps((work, arguments))
    thread = threading.Thread(target=worker.train, args=(run, ALONE, task))
    thread.start()
    messages = list[object]()
    while not any(isinstance(message, Result | Failure) for message in messages):
        received = worker.receive()
        messages += received
        for message in received:
            if isinstance(message, Call):
                worker.answer(None)
    thread.join()
    return messages


def write_checkpoint(place: Place, folders: TrainingFolders) -> str:
    assert (folders.base / "config.json").read_bytes() == b"{}"

    def announce(path: Path) -> None:
        place.pipe.send(Call("on_checkpoint", (path,)))
        assert place.pipe.recv() is None

    with CheckpointFolder(folders.checkpoints, 2, announce).writing(7) as folder:
        (folder / "weights.safetensors").write_bytes(b"weights")
    folders.out.mkdir()
    (folders.out / "adapter_model.safetensors").write_bytes(b"adapter")
    return "done"


def print_lines(place: Place, folders: TrainingFolders) -> None:
    console.print("on the console")
    sys.stderr.write("a warning\n")
    folders.out.mkdir()


def fail(place: Place, folders: TrainingFolders) -> None:
    raise TrainingError("the loss exploded")


def test_checkpoint_is_uploaded_to_the_object_store_before_it_is_announced(worker: RayWorker, run: SharedRun) -> None:
    messages = train(worker, run, write_checkpoint)
    assert [message.name for message in messages if isinstance(message, Call)] == ["on_checkpoint", TRAINED]
    assert messages[-1] == Result("done")
    keys = ObjectStore(run.artifacts).keys("checkpoints/tiny-1")
    assert "checkpoints/tiny-1/step-00000007.json" in keys


def test_trained_adapter_is_passed_to_the_caller_through_the_object_store(
    worker: RayWorker, run: SharedRun, tmp_path: Path
) -> None:
    messages = train(worker, run, write_checkpoint)
    (records,) = next(
        message.arguments for message in messages if isinstance(message, Call) and message.name == TRAINED
    )
    caller = SharedCheckpoints(ObjectStore(run.artifacts), run.name, tmp_path / "checkpoints", tmp_path / "mlflow.json")
    caller.fetch_trained(records, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"adapter"


def test_console_output_of_a_ray_worker_is_sent_to_the_caller(worker: RayWorker, run: SharedRun) -> None:
    text = "".join(message.text for message in train(worker, run, print_lines) if isinstance(message, Text))
    assert text == "on the console\na warning\n"


def test_last_message_of_a_failed_ray_worker_contains_its_error(worker: RayWorker, run: SharedRun) -> None:
    last = train(worker, run, fail)[-1]
    assert isinstance(last, Failure)
    assert str(last.error) == "the loss exploded"


def test_folder_of_a_killed_worker_is_deleted_by_the_next_worker(worker: RayWorker, run: SharedRun) -> None:
    killed = run.folder / "training" / "other-attempt-node"
    killed.mkdir(parents=True)
    (killed / "lock").write_text("")
    worker.prepare(run)
    assert not killed.exists()


def test_no_folder_of_the_run_remains_when_the_worker_has_cleaned_up(worker: RayWorker, run: SharedRun) -> None:
    train(worker, run, print_lines)
    worker.clean()
    assert list((run.folder / "training").iterdir()) == []
    assert (run.folder / "bases" / run.base).is_dir()


def test_ray_worker_deletes_no_run_folders_when_its_folder_is_the_tuneserve_home(
    worker: RayWorker, run: SharedRun
) -> None:
    own = run.folder / "runs" / "tiny-0123456789ab"
    own.mkdir(parents=True)
    (own / "lock").write_text("")
    worker.prepare(run)
    assert own.exists()
