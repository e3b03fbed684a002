"""Tests what engines need of a cluster, and what is refused before a server starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from serving.engines.ray.cluster import RayCluster
from serving.engines.ray.cluster_query import Described, Resources
from serving.engines.ray.machines import RayMachines, count_fitting
from svc.errors import EngineError, SettingsError
from svc.ray.need import Need
from svc.settings.engine import Device, EngineSettings
from svc.settings.settings import Settings
from tests.svc.engine.devices import AVX512

ON_RAY = {"launcher": "ray"}
H100 = Need(gpus=1, gpu_type="H100")


def machines(tmp_path: Path, **settings: Any) -> RayMachines:
    values = {"home": tmp_path, "engine": ON_RAY, "artifacts": {"url": tmp_path.as_uri()}, **settings}
    return RayMachines(Settings.model_validate(values), tmp_path / "models")


def engine(**values: Any) -> EngineSettings:
    return EngineSettings.model_validate(ON_RAY | values)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Need, ...]]:
    """Let every cluster have what is needed in the last place, and two machines
    free. Return what was asked for."""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    asked: list[tuple[Need, ...]] = []

    def describe(self: RayCluster, needs: tuple[Need, ...], folder: str, wait_s: float) -> Described:
        asked.append(needs)
        return Described(need=needs[-1], capabilities=AVX512)

    monkeypatch.setattr(RayCluster, "describe", describe)
    set_resources(monkeypatch, grows=False)
    return asked


def set_resources(monkeypatch: pytest.MonkeyPatch, *, grows: bool) -> None:
    """Let every cluster have two machines free, and add machines on demand or not."""

    async def resources(self: RayCluster) -> Resources:
        return Resources(free=({"CPU": 1.0, "GPU": 4.0}, {"GPU": 2.0}), grows=grows)

    monkeypatch.setattr(RayCluster, "resources", resources)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Let a cluster that adds machines add up to two. Return how many were requested, and for how long."""
    requests: list[tuple[int, float]] = []

    async def grow(self: RayCluster, needs: Sequence[Need], wait_s: float) -> bool:
        requests.append((len(needs), wait_s))
        return len(needs) <= 2

    monkeypatch.setattr(RayCluster, "grow", grow)
    return requests


def test_ray_cluster_is_not_queried_when_no_engine_runs_on_ray(tmp_path: Path, asked: list[tuple[Need, ...]]) -> None:
    machines(tmp_path, engine={}).check()
    assert asked == []


def test_ray_settings_of_an_individual_model_are_also_checked(tmp_path: Path, asked: list[tuple[Need, ...]]) -> None:
    machines(tmp_path, engine={}, models={"big": {"engine": ON_RAY}}).check()
    assert len(asked) == 1


def test_ray_engines_without_an_artifact_store_setting_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"artifacts\.url is not set") as error:
        machines(tmp_path, artifacts={}).check()
    assert "svc models push" in error.value.todo


def test_ray_engines_without_a_cluster_address_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SettingsError, match="address of the Ray cluster is not set"):
        machines(tmp_path).check()


def test_engine_that_spans_several_machines_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="own Ray executor"):
        machines(tmp_path, engine={**ON_RAY, "args": ["--distributed-executor-backend", "ray"]}).check()


def test_error_names_the_address_of_an_unreachable_ray_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.ray.cluster.sys.executable", "/bin/false")
    with pytest.raises(EngineError, match="head:6379 did not answer"):
        machines(tmp_path, ray={"address": "head:6379"}).check()


@pytest.mark.parametrize(
    ("engine", "ray", "needs"),
    [
        ({"device": "cuda"}, {}, [{"GPU": 1}]),
        ({"device": "cuda", "tensor_parallel": 4}, {}, [{"GPU": 4}]),
        ({"device": "cuda"}, {"gpu_type": "H100"}, [{"GPU": 1, "accelerator_type:H100": 0.001}]),
        ({"device": "cpu"}, {}, [{"CPU": 1}]),
        ({"device": "cpu", "cores": 8}, {}, [{"CPU": 8}]),
        ({}, {"cpus": 4}, [{"GPU": 1}, {"CPU": 4}]),
    ],
)
def test_engine_requests_the_ray_resources_implied_by_its_settings(
    tmp_path: Path,
    asked: list[tuple[Need, ...]],
    engine: dict[str, Any],
    ray: dict[str, Any],
    needs: list[dict[str, float]],
) -> None:
    machines(tmp_path, engine=ON_RAY | engine, ray=ray).check()
    assert [need.resources for need in asked[0]] == needs


async def test_resource_shortage_is_reported_when_the_ray_cluster_lacks_capacity(
    tmp_path: Path, asked: list[tuple[Need, ...]]
) -> None:
    cluster, on_cpu = machines(tmp_path), engine(device=Device.CPU)
    assert await cluster.shortage([on_cpu]) is None
    shortage = await cluster.shortage([on_cpu] * 2)
    assert (
        shortage == "2 more engines need 1 CPU each, but the Ray cluster has enough free resources for only 1 of them"
    )


async def test_resource_shortage_check_uses_the_requirements_of_each_engine(
    tmp_path: Path, asked: list[tuple[Need, ...]]
) -> None:
    small, large = engine(device=Device.CUDA), engine(device=Device.CUDA, tensor_parallel=4)
    cluster = machines(tmp_path)
    assert await cluster.shortage([small, small, large]) is None
    shortage = await cluster.shortage([small, large, large])
    assert shortage == (
        "3 more engines need 1 x 1 GPU, 2 x 4 GPU, but the Ray cluster has enough free resources for only 2 of them"
    )


async def test_engine_start_waits_for_machines_when_the_cluster_adds_them_on_demand(
    tmp_path: Path, asked: list[tuple[Need, ...]], requests: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, on_cpu = machines(tmp_path, ray={"wait_s": 600}), engine(device=Device.CPU)
    set_resources(monkeypatch, grows=True)
    assert await cluster.shortage([on_cpu] * 2) is None
    assert requests == [(2, 600)]


@pytest.mark.parametrize(
    ("wait_s", "reason"),
    [
        pytest.param(600, "cannot add suitable machines", id="the autoscaler cannot add such machines"),
        pytest.param(1e-9, "added no suitable machines within 1e-09 s (ray.wait_s)", id="timeout"),
    ],
)
async def test_resource_shortage_is_reported_when_the_cluster_adds_no_machine_in_time(
    tmp_path: Path,
    asked: list[tuple[Need, ...]],
    requests: list[tuple[int, float]],
    monkeypatch: pytest.MonkeyPatch,
    wait_s: float,
    reason: str,
) -> None:
    cluster, on_cpu = machines(tmp_path, ray={"wait_s": wait_s}), engine(device=Device.CPU)
    set_resources(monkeypatch, grows=True)
    assert await cluster.shortage([on_cpu] * 3) == (
        "3 more engines need 1 CPU each, but the Ray cluster has enough free resources for only 1 of them, and "
        f"{reason}"
    )


@pytest.mark.parametrize("grows", [False, True])
async def test_no_machine_is_requested_when_capacity_suffices_or_the_cluster_cannot_grow(
    tmp_path: Path,
    asked: list[tuple[Need, ...]],
    requests: list[tuple[int, float]],
    monkeypatch: pytest.MonkeyPatch,
    grows: bool,
) -> None:
    cluster, on_cpu = machines(tmp_path), engine(device=Device.CPU)
    set_resources(monkeypatch, grows=grows)
    await cluster.shortage([on_cpu] * (1 if grows else 2))
    assert requests == []


@pytest.mark.parametrize(
    ("needs", "free", "fitting"),
    [
        ([Need(gpus=2)] * 5, [{"GPU": 8.0}], 4),
        ([Need(gpus=2)], [{"GPU": 1.0}, {"GPU": 1.0}], 0),
        ([H100], [{"GPU": 2.0}], 0),
        ([H100] * 3, [{"GPU": 2.0, "accelerator_type:H100": 1.0}], 2),
        ([Need(gpus=1)] * 4 + [Need(gpus=4)], [{"GPU": 4.0}, {"GPU": 4.0}], 5),
        ([Need(gpus=1), Need(gpus=2)], [{"GPU": 2.0}, {"GPU": 1.0}], 2),
        ([Need(gpus=1), Need(cpus=2)], [{"CPU": 3.0}], 1),
        ([Need(cpus=0.1)] * 10, [{"CPU": 1.0}], 10),
    ],
)
def test_number_of_engines_that_fit_is_computed_from_the_free_resources_of_each_machine(
    needs: list[Need], free: list[dict[str, float]], fitting: int
) -> None:
    assert count_fitting(needs, free) == fitting


@pytest.mark.slow  # imports Ray
def test_error_for_an_address_without_a_ray_cluster_includes_the_connection_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: .*refused"):
        machines(tmp_path, ray={"address": "127.0.0.1:1"}).check()
