"""Tests the listed devices and the measured speed of this machine."""

from pathlib import Path

import pytest

from svc.engine.device import DeviceCapabilities, NumberType
from svc.engine.gpus import GPUS_FILE
from svc.errors import SettingsError
from svc.settings.engine import Device
from trainer.estimate import devices
from trainer.estimate.devices import choose_devices, measured_speed, read_devices

ABLE = DeviceCapabilities(
    instruction_set="x86_64-avx2",
    cpu_bfloat16=False,
    gpu=None,
    vllm="0.32",
    engine_device=Device.CPU,
    vllm_gptq=False,
    vllm_int8=True,
    vllm_fp8=False,
)


def test_device_list_includes_common_gpus() -> None:
    assert set(read_devices()) >= {"rtx-3090", "rtx-4090", "a100-40", "a100-80", "h100", "h200"}


def test_unknown_device_error_lists_known_devices(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'rtx-9090'") as caught:
        choose_devices(["rtx-9090"], tmp_path)
    assert "rtx-4090" in caught.value.expected


def test_device_price_can_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "gpus.yaml"
    file.write_text(GPUS_FILE.read_text().replace("dollars: 0.60", "dollars: 0.10"))
    assert read_devices(file)["rtx-4090"].dollars == 0.10


@pytest.mark.parametrize("content", ["devices: 3", "[", "devices: {a: {label: x}}"])
def test_invalid_devices_file_is_named_in_the_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "gpus.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=r"gpus\.yaml"):
        read_devices(file)


def test_machine_speed_is_measured_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([5e9])
    monkeypatch.setattr(devices, "measure_matrix_speed", lambda *_, **__: next(measured))
    first = measured_speed(ABLE, NumberType.FLOAT32, tmp_path)
    assert first == measured_speed(ABLE, NumberType.FLOAT32, tmp_path) == 5e9


def test_machine_speed_is_measured_separately_for_each_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([5e9, 7e9])
    monkeypatch.setattr(devices, "measure_matrix_speed", lambda *_, **__: next(measured))
    measured_speed(ABLE, NumberType.FLOAT32, tmp_path)
    assert measured_speed(ABLE, NumberType.BFLOAT16, tmp_path) == 7e9
