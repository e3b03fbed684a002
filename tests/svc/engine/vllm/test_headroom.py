"""Tests that a second engine starts only with enough memory for its weights, one sequence and itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svc.engine.machine import Gpu, Machine
from svc.engine.vllm import headroom
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.lora import LoraSlots
from svc.engine.vllm.plan import GIB
from svc.settings.engine import EngineSettings
from tests.svc.engine.devices import AVX512, HOPPER

CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256, "max_position_embeddings": 1024}
ENGINE = 2 * GIB


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a 3 GiB model that takes no space on disk."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(3 * GIB)
    return tmp_path


def shortage(
    monkeypatch: pytest.MonkeyPatch, model: Path, machine: Machine, *, engines: int = 1, **settings: Any
) -> str | None:
    monkeypatch.setattr(headroom, "read_machine", lambda **_: machine)
    chosen = EngineSettings(device="cuda" if machine.gpus else "cpu", **settings)
    capable = HOPPER if machine.gpus else AVX512
    spec = EngineSpec(model, "tuned", model, model, model / "engine.log", model, capable, chosen)
    return headroom.shortage([spec] * engines)


def host(free: int, *gpus: int) -> Machine:
    found = tuple(Gpu("H100", 80 * GIB, each) for each in gpus)
    return Machine(cores=(0, 1), quota=None, memory=64 * GIB, free=free, gpus=found)


def test_engine_needs_memory_for_its_overhead_as_well_as_the_weights_and_one_sequence(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    sequence = 2 * 2 * 256 * 2 * 1024
    assert shortage(monkeypatch, model, host(3 * GIB + ENGINE + sequence)) is None
    assert shortage(monkeypatch, model, host(3 * GIB + ENGINE + sequence - 1)) is not None


def test_memory_requirement_is_multiplied_by_the_number_of_engines(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    one = 3 * GIB + ENGINE + 2 * 2 * 256 * 2 * 1024
    assert shortage(monkeypatch, model, host(2 * one), engines=2) is None
    said = shortage(monkeypatch, model, host(2 * one - 1), engines=2)
    assert said == "2 engines need about 10.0 GiB, but only 10.0 GiB are free"
    assert shortage(monkeypatch, model, host(0), engines=0) is None


def test_longer_context_requires_more_memory(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    free = 3 * GIB + ENGINE + 2 * 2 * 256 * 2 * 512
    assert shortage(monkeypatch, model, host(free), max_model_len=512) is None
    assert shortage(monkeypatch, model, host(free), max_model_len=513) is not None


def test_memory_shortage_message_states_the_needed_and_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    assert shortage(monkeypatch, model, host(4 * GIB)) == "it needs about 5.0 GiB, but only 4.0 GiB are free"


def test_only_gpu_memory_is_checked_if_the_engine_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    assert shortage(monkeypatch, model, host(0, 6 * GIB)) is None
    said = shortage(monkeypatch, model, host(64 * GIB, 4 * GIB))
    assert said == "it needs about 5.0 GiB, but only 4.0 GiB of GPU memory are free"


def test_headroom_is_determined_by_the_gpu_with_the_least_free_memory(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    assert shortage(monkeypatch, model, host(0, 3 * GIB, 3 * GIB)) is None
    assert shortage(monkeypatch, model, host(0, 70 * GIB, GIB)) is not None
    assert shortage(monkeypatch, model, host(0, 70 * GIB, GIB), tensor_parallel=1) is None


def test_memory_shortage_is_reported_if_less_than_the_configured_gpu_memory_share_is_free(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    assert shortage(monkeypatch, model, host(0, 40 * GIB), gpu_memory_share=0.5) is None
    said = shortage(monkeypatch, model, host(0, 39 * GIB), gpu_memory_share=0.5)
    assert said == "it needs about 40.0 GiB, but only 39.0 GiB of GPU memory are free"
    assert shortage(monkeypatch, model, host(0, 39 * GIB), args=("--gpu-memory-utilization", "0.5")) is not None


def test_memory_requirement_includes_adapters(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(headroom, "read_machine", lambda **_: host(3 * GIB + ENGINE + 2 * 2 * 256 * 2 * 1024))
    spec = EngineSpec(model, "tuned", model, model, model / "engine.log", model, AVX512, EngineSettings(device="cpu"))
    assert headroom.shortage([spec]) is None
    slots = LoraSlots(max_loaded=1, max_batched=1, max_rank=16, targets=(), bytes=GIB)
    assert headroom.shortage([replace(spec, lora=slots)]) == "it needs about 7.0 GiB, but only 5.0 GiB are free"


@pytest.mark.parametrize(("free", "enough"), [(6 * GIB, True), (6 * GIB - 1, False)])
def test_engine_can_sleep_if_free_main_memory_is_at_least_twice_the_weight_size(
    monkeypatch: pytest.MonkeyPatch, model: Path, free: int, enough: bool
) -> None:
    monkeypatch.setattr(headroom, "read_machine", lambda **_: host(free))
    spec = EngineSpec(model, "tuned", model, model, model / "engine.log", model, HOPPER)
    assert (headroom.backup_shortage(spec) is None) is enough


def test_main_memory_needed_for_sleep_includes_adapters(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(headroom, "read_machine", lambda **_: host(6 * GIB))
    slots = LoraSlots(max_loaded=1, max_batched=1, max_rank=16, targets=(), bytes=GIB)
    spec = EngineSpec(model, "tuned", model, model, model / "engine.log", model, HOPPER, lora=slots)
    said = headroom.backup_shortage(spec)
    assert said == "its weights may need 10.0 GiB of main memory, but only 6.0 GiB are free"
