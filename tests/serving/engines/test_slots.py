"""How the engines of a home are started, by its settings."""

from pathlib import Path

import pytest

from serving.engines.served_model import ServedModel
from serving.engines.slots import EngineSlots
from svc.settings import Settings
from tests.svc.engine.devices import AVX512


@pytest.mark.parametrize(("name", "idles"), [("tuned", True), ("other", False)])
def test_an_engine_knows_whether_its_model_has_an_idle_time(tmp_path: Path, name: str, idles: bool) -> None:
    settings = Settings.model_validate({"home": tmp_path, "models": {"tuned": {"idle_s": 60}}})
    slots = EngineSlots(settings, AVX512, served=list)
    assert slots.spec(0, name, ServedModel(tmp_path)).idles is idles
