"""Tests how a home's engines are started with its settings."""

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from serving.engines import slots
from serving.engines.ray.cluster import RayCluster
from serving.engines.ray.machines import RayMachines
from serving.engines.ray.record import ActorRecord, end_postponed, postpone_end, read_actor, write_actor
from serving.engines.served_model import ServedModel
from serving.engines.slots import EngineSlots
from svc.engine.vllm.folders import all_states, state_folder
from svc.engine.vllm.launch import EngineSpec
from svc.errors import EngineError
from svc.registry.registry import Registry
from svc.settings.engine import EngineSettings
from svc.settings.settings import Settings
from svc.version import Target, VersionId
from tests.serving.control import until
from tests.serving.versions import NAME, AliasBook, make_version, target
from tests.svc.engine.devices import AVX512


def slots_of(home: Path, **of_model: object) -> EngineSlots:
    """Return engine slots whose settings for one model differ from the defaults."""
    settings = Settings.model_validate({"home": home, "models": {NAME: of_model}})
    return EngineSlots(settings, Registry(home / "models", AliasBook()), AVX512, list)


@pytest.mark.parametrize(("name", "idles"), [(NAME, True), ("other", False)])
def test_sleep_mode_is_enabled_only_if_the_model_has_an_idle_timeout(tmp_path: Path, name: str, idles: bool) -> None:
    assert slots_of(tmp_path, idle_s=60).spec(0, name, ServedModel(tmp_path)).idles is idles


@pytest.mark.parametrize(("name", "mode"), [(NAME, "compiled"), ("other", "eager")])
def test_engine_kind_depends_on_the_settings_of_its_model(tmp_path: Path, name: str, mode: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert slots_of(tmp_path, engine={"args": ["--no-enforce-eager"]}).facts(name, tmp_path).mode == mode


async def test_memory_is_checked_for_all_engines_of_all_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_home, checked = slots_of(tmp_path), list[EngineSpec]()
    for number in (1, 2):
        make_version(Registry(tmp_path / "models", AliasBook()), number)
    monkeypatch.setattr(slots, "shortage", checked.extend)
    assert await of_home.shortage({target(1): 2, target(2): 1}) is None
    assert [spec.model.parent.name for spec in checked] == ["1", "1", "2"]


async def test_cluster_capacity_is_checked_with_the_engine_settings_of_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {NAME: {"engine": {"tensor_parallel": 4}}, "other": {}}
    settings = Settings.model_validate({"home": tmp_path, "engine": {"launcher": "ray"}, "models": models})
    registry, checked = Registry(tmp_path / "models", AliasBook()), list[EngineSettings]()
    for name in models:
        make_version(registry, 1, name=name)

    async def shortage(machines: RayMachines, engines: Sequence[EngineSettings]) -> None:
        checked.extend(engines)

    monkeypatch.setattr(RayMachines, "capabilities", lambda machines, settings: AVX512)
    monkeypatch.setattr(RayMachines, "shortage", shortage)
    of_home = EngineSlots(settings, registry, AVX512, list)
    assert await of_home.shortage({target(1): 1, Target(VersionId("other", 1), target(1).format): 2}) is None
    assert [each.tensor_parallel for each in checked] == [4, None, None]


@pytest.mark.parametrize(("other", "engines"), [("local", 5), ("ray", 4)])
def test_engines_on_a_ray_cluster_are_not_counted_as_running_on_the_local_machine(
    tmp_path: Path, other: str, engines: int
) -> None:
    settings = Settings.model_validate(
        {
            "home": tmp_path,
            "models": {NAME: {"engine": {"replicas": {"min": 1, "max": 4}}}, "other": {"engine": {"launcher": other}}},
        }
    )
    of_home = EngineSlots(settings, Registry(tmp_path / "models", AliasBook()), AVX512, lambda: [NAME, "other"])
    assert of_home.spec(0, NAME, ServedModel(tmp_path)).engines == engines


@pytest.mark.slow
async def test_ray_actor_replaced_by_a_local_engine_is_stopped_when_the_ray_cluster_becomes_reachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_END_PAUSES_S", (0.01,))
    away, ended, of_home = True, list[str](), slots_of(tmp_path)

    def end(cluster: RayCluster, *names: str) -> None:
        if away:
            raise EngineError(f"cannot connect to the Ray cluster {cluster.address}")
        ended.extend(names)

    monkeypatch.setattr(RayCluster, "end", end)
    write_actor(state_folder(tmp_path, 0), ActorRecord(name="tuned-0", cluster="head:6379", certificate="c", key="k"))
    assert await of_home.orphans() == [0]
    await of_home.end_orphans()
    assert read_actor(state_folder(tmp_path, 0)) is None  # a local engine now has the number
    of_home.take(0)
    ending = asyncio.create_task(of_home.end_postponed())
    await asyncio.sleep(0.1)
    assert ended == []
    away = False
    await until(lambda: ended == ["tuned-0"])
    await asyncio.sleep(0.1)
    assert ended == ["tuned-0"]
    ending.cancel()


def test_server_in_a_copied_home_folder_does_not_stop_ray_actors_of_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RayCluster, "end", lambda cluster, *names: pytest.fail("ended"))
    folder = state_folder(tmp_path / "home", 0)
    write_actor(folder, ActorRecord(name="tuned-0", cluster="head:6379", certificate="c", key="k"))
    postpone_end(folder)
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    assert end_postponed(all_states(tmp_path / "copy")) == ([], [])
