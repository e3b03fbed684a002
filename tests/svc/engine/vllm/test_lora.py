"""Tests how an engine with adapter slots is started, and that an engine without slots starts as before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svc.engine.vllm.launch import command, environment, launch_digest
from svc.engine.vllm.lora import RUNTIME_VARIABLE, USUAL_TARGETS, LoraSlots, choose_slots
from tests.builders.engine_specs import option, spec

SLOTS = LoraSlots(max_loaded=8, max_batched=4, max_rank=16, targets=("k_proj", "q_proj"), bytes=100)


def chosen(**changes: Any) -> LoraSlots:
    usual: dict[str, Any] = {"max_loaded": 8, "max_rank": None, "rank": 16, "size": 100}
    return choose_slots(**usual | {"targets": frozenset({"q_proj"})} | changes)


@pytest.mark.parametrize(
    ("rank", "largest"), [(1, 16), (16, 16), (17, 32), (64, 64), (200, 256), (300, 320), (512, 512)]
)
def test_maximum_lora_rank_is_the_adapter_rank_rounded_up_to_the_next_supported_rank(rank: int, largest: int) -> None:
    assert chosen(rank=rank).max_rank == largest


def test_maximum_lora_rank_can_be_configured() -> None:
    assert chosen(max_rank=4).max_rank == 8
    assert chosen(max_rank=100, rank=16).max_rank == 128


def test_adapters_per_batch_never_exceed_the_maximum_number_of_loaded_adapters() -> None:
    assert chosen(max_loaded=4).max_batched == 4
    assert chosen(max_loaded=500).max_batched == 8


def test_lora_targets_include_default_and_adapter_layers_but_not_the_output_layer() -> None:
    assert set(chosen(targets=frozenset({"c_attn"})).targets) == USUAL_TARGETS | {"c_attn"}
    assert "lm_head" not in chosen().targets


def test_adapter_memory_is_computed_for_the_maximum_rank() -> None:
    assert chosen(rank=8, size=100, max_loaded=3).memory == 200 * (3 + 3)


def test_engine_with_adapter_slots_gets_lora_arguments(tmp_path: Path) -> None:
    made = replace(spec(tmp_path), lora=SLOTS)
    arguments = command(made)
    assert "--enable-lora" in arguments
    assert [option(arguments, f"--max-{name}") for name in ("loras", "cpu-loras", "lora-rank")] == ["4", "8", "16"]
    at = arguments.index("--lora-target-modules")
    assert arguments[at + 1 : at + 3] == ["k_proj", "q_proj"]
    assert environment(made)[RUNTIME_VARIABLE] == "True"
    assert made.plan["max_lora_rank"].value == 16


def test_explicit_arguments_override_adapter_settings(tmp_path: Path) -> None:
    made = replace(spec(tmp_path, args=("--max-loras", "2")), lora=SLOTS)
    assert made.plan["max_loras"].value == 2
    assert command(made).count("--max-loras") == 1


def test_engine_without_adapter_slots_gets_no_lora_arguments_or_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNTIME_VARIABLE, "True")
    assert "--enable-lora" not in command(spec(tmp_path))
    assert RUNTIME_VARIABLE not in environment(spec(tmp_path))


def test_launch_digest_depends_on_adapter_slots_and_base_model(tmp_path: Path) -> None:
    made = replace(spec(tmp_path), lora=SLOTS)
    others = [
        spec(tmp_path),
        replace(made, lora=replace(SLOTS, max_rank=32)),
        replace(made, lora=replace(SLOTS, targets=("q_proj",))),
        replace(made, model=tmp_path / "other"),
    ]
    assert launch_digest(made) not in {launch_digest(other) for other in others}
    assert launch_digest(made) == launch_digest(replace(made, lora=replace(SLOTS, bytes=7)))
