"""Tests what a training on Ray asks of a cluster, and when it is refused."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from svc.engine.device import DeviceCapabilities, TorchGpu
from svc.errors import BusyError, TrainingError
from svc.ray.need import Need
from svc.settings.engine import RaySettings
from tests.svc.engine.devices import AVX512
from trainer.callbacks.preemption import Preemption
from trainer.model.run_record import MachineRecord
from trainer.training.parallel.processes import Failure, Supervisor
from trainer.training.parallel.ray_processes import (
    _Output,
    _Workers,
    check_equal,
    choose_kind,
    count_fitting,
    reserved,
    shortage,
)
from trainer.training.parallel.ray_worker import NodeFacts, SharedRun

H100 = Need(8, gpus=1, gpu_type="H100")


def with_gpu(name: str, *, bfloat16: bool = True) -> DeviceCapabilities:
    gpu = TorchGpu(name=name, compute_capability=(9, 0), bfloat16=bfloat16)
    return AVX512.model_copy(update={"gpu": gpu})


def facts(number: int, capabilities: DeviceCapabilities, version: str | None = None) -> NodeFacts:
    from importlib.metadata import version as installed

    machine = MachineRecord(processor="CPU", cores=1, memory=1, gpus=(), system="Linux", python="3.11")
    return NodeFacts(str(number), f"10.0.0.{number}", version or installed("tuneserve"), capabilities, machine)


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    named = {key.replace("type_", "accelerator_type:"): value for key, value in resources.items()}
    return {"Alive": alive, "NodeManagerHostname": name, "Resources": named}


@pytest.mark.parametrize(
    ("settings", "resources", "bundle"),
    [
        ({}, {"CPU": 4.0}, {"CPU": 1.0}),
        ({"cpus": 2}, {"CPU": 4.0, "GPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}),
        ({"gpu_type": "H100"}, {"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}),
    ],
    ids=["no GPUs", "GPUs", "GPUs that the cluster may add"],
)
def test_ray_worker_reserves_a_gpu_when_the_cluster_has_gpus_or_can_add_them(
    settings: dict[str, Any], resources: dict[str, float], bundle: dict[str, float]
) -> None:
    assert choose_kind(RaySettings(**settings), resources).resources == bundle


def test_error_says_how_many_workers_fit_when_the_cluster_is_too_small() -> None:
    nodes = [
        node("a", CPU=64, GPU=8, type_H100=1),
        node("b", CPU=12, GPU=2, type_H100=1),  # CPU cores for one
        node("c", CPU=64, GPU=8, type_A100=1),
        node("d", alive=False, CPU=64, GPU=8, type_H100=1),
    ]
    error = shortage(H100, 16, nodes, {}, 10)
    assert "16 workers with 8 CPU and 1 GPU (H100) each within 10 s: its nodes have capacity for only 9" in error.wrong
    assert "a: 64 CPU, 8 GPU, H100; b: 12 CPU, 2 GPU, H100; c: 64 CPU, 8 GPU, A100" in error.wrong
    assert "set train.devices to 9" in error.todo


def test_error_says_that_other_jobs_use_the_resources_when_the_cluster_is_large_enough_but_busy() -> None:
    error = shortage(H100, 2, [node("a", CPU=64, GPU=8, type_H100=1)], {"CPU": 64, "GPU": 1}, 10)
    assert "other jobs use them; currently free: 64 CPU, 1 GPU" in error.wrong
    assert "ray.wait_s" in error.todo


def test_ray_workers_with_equal_devices_and_versions_are_accepted() -> None:
    check_equal([facts(1, with_gpu("H100")), facts(2, with_gpu("H100"))])


def test_ray_workers_with_different_gpus_are_rejected() -> None:
    with pytest.raises(TrainingError, match=r"H100 with \w+ on node 10\.0\.0\.1, A100 with \w+ on 10\.0\.0\.2"):
        check_equal([facts(1, with_gpu("H100")), facts(2, with_gpu("A100"))])


def test_ray_workers_are_rejected_when_a_node_has_a_different_tuneserve_version() -> None:
    with pytest.raises(TrainingError, match=r"node 10\.0\.0\.2 has tuneserve 0\.0\.1, but this machine"):
        check_equal([facts(1, AVX512), facts(2, AVX512, "0.0.1")])


class _FailingActor:
    """Stands in for an actor whose task fails."""

    def __init__(self, number: int, outcome: Failure) -> None:
        self.describe = self._method(facts(number, AVX512))
        self.prepare, self.train = self._method(None), self._method(None)
        self.find_meeting, self.receive = self._method("tcp://10.0.0.0:1"), self._method([outcome])

    @staticmethod
    def _method(value: object) -> SimpleNamespace:
        class Reference:
            def __init__(self, *arguments: object) -> None:
                self.value = value

        return SimpleNamespace(remote=Reference)


def test_first_received_worker_failure_is_reported_even_if_node_clocks_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second worker's connection breaks because the first one has run out of memory."""
    outcomes = (Failure(9e9, TrainingError("out of memory")), Failure(1.0, None, "connection closed by peer"))
    monkeypatch.setattr("ray.wait", lambda refs, **_: (list(refs), []))
    monkeypatch.setattr("ray.get", lambda refs: [ref.value for ref in refs] if isinstance(refs, list) else refs.value)
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("ray.kill", lambda actor: None)
    actors: list[Any] = [_FailingActor(number, outcome) for number, outcome in enumerate(outcomes)]
    run = SharedRun("s3://bucket", "tiny-1", "base", b"{}", Path("/nodes"), "attempt")
    workers = _Workers(actors, run, Preemption(), _Output(""))
    workers.train(b"", Preemption())
    with pytest.raises(TrainingError, match="out of memory"):
        Supervisor(workers, {}, Preemption()).serve()


@pytest.mark.parametrize(
    ("size", "free", "expected"),
    [(1, 3.0, 3), (1, 2.0, 2), (2, 3.0, 1), (4, 3.0, 1)],
    ids=["all", "used", "pairs", "few"],
)
def test_number_of_concurrent_runs_is_limited_by_free_resources_but_is_at_least_one(
    size: int, free: float, expected: int
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 1.0}}] * 3 + [{"Alive": False, "Resources": {"CPU": 9.0}}]
    assert count_fitting(Need(1, gpus=0, gpu_type=None), size, nodes, {"CPU": free}) == expected


def test_ray_worker_output_lines_are_prefixed_with_the_title_of_their_training_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = _Output("trial 3")
    for part in ("  Training: ", "step 1/2\n\n  Trai", "ning: step 2/2\n"):
        output.write(part)
    assert capsys.readouterr().err == "  trial 3: Training: step 1/2\n  trial 3: Training: step 2/2\n"


def test_wait_for_resources_does_not_time_out_while_another_training_run_uses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The wait ends once the other training run has ended."""
    trains = iter([True] * 5)
    waits = list[object]()
    group = SimpleNamespace(ready=lambda: "ready")
    monkeypatch.setattr("trainer.training.parallel.ray_processes.time.monotonic", count().__next__)
    monkeypatch.setattr("ray.util.placement_group", lambda *_, **__: group)
    monkeypatch.setattr("ray.util.remove_placement_group", lambda group: None)

    def wait(refs: list[object], timeout: float) -> tuple[list[object], list[object]]:
        waits.append(refs)
        return [], refs

    monkeypatch.setattr("ray.wait", wait)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "NodeManagerHostname": "a", "Resources": {"CPU": 1.0}}])
    monkeypatch.setattr("ray.available_resources", dict)
    kind = Need(1, gpus=0, gpu_type=None)
    with (
        pytest.raises(BusyError, match="other jobs use them"),
        reserved(kind, 1, 1.5, None, lambda: next(trains, False)),
    ):
        pass
    assert len(waits) > 5
