"""Tests how a home's engines are started with its settings."""

from pathlib import Path

import pytest

from serving.replicas import slots
from serving.replicas.served_model import ServedModel
from serving.replicas.slots import EngineSlots
from svc.engine.vllm.launch import EngineSpec
from svc.registry.registry import Registry
from svc.settings import Settings
from tests.serving.versions import NAME, AliasBook, make_version, target
from tests.svc.engine.devices import AVX512


def slots_of(home: Path, **of_model: object) -> EngineSlots:
    """Return engine slots whose settings for one model differ from the defaults."""
    settings = Settings.model_validate({"home": home, "models": {NAME: of_model}})
    return EngineSlots(settings, Registry(home / "models", AliasBook()), AVX512, list)


@pytest.mark.parametrize(("name", "idles"), [(NAME, True), ("other", False)])
def test_engine_is_started_with_idling_only_if_its_model_may_idle(tmp_path: Path, name: str, idles: bool) -> None:
    assert slots_of(tmp_path, idle_s=60).spec(0, name, ServedModel(tmp_path)).idles is idles


@pytest.mark.parametrize(("name", "mode"), [(NAME, "compiled"), ("other", "eager")])
def test_engine_kind_depends_on_its_model_settings(tmp_path: Path, name: str, mode: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert slots_of(tmp_path, engine={"args": ["--no-enforce-eager"]}).facts(name, tmp_path).mode == mode


def test_memory_is_checked_for_all_engines_of_all_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_home, checked = slots_of(tmp_path), list[EngineSpec]()
    for number in (1, 2):
        make_version(Registry(tmp_path / "models", AliasBook()), number)
    monkeypatch.setattr(slots, "shortage", checked.extend)
    assert of_home.shortage({target(1): 2, target(2): 1}) is None
    assert [spec.model.parent.name for spec in checked] == ["1", "1", "2"]
