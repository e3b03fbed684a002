"""Tests `svc estimate`, and how `svc train` uses the estimate."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from svc.dataset.readers.preferences import write_pairs
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.preference import PreferencePair
from svc.errors import InsufficientMemoryError
from tests.command_line import Svc
from tests.svc.chats import chat
from tests.svc.engine.devices import AVX512
from tests.trainer.estimate.configs import FOLDER, cpu_device
from trainer.estimate import devices

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a recipe whose base consists only of a config."""
    monkeypatch.setattr(devices, "this_machine", lambda *_: cpu_device())
    monkeypatch.setattr(devices, "read_capabilities", lambda _: None)
    monkeypatch.setattr("svc.engine.device.ask_capabilities", lambda: AVX512)  # else a process imports torch and vLLM
    write_examples(tmp_path / "train.jsonl", [chat(f"question {number}") for number in range(40)])
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: big\nbase: {FOLDER / 'llama-2-70b'}\ndata: {{train: train.jsonl}}\n")
    return path


def test_estimate_needs_only_the_base_config(svc: Svc, tmp_path: Path, recipe: Path) -> None:
    ended = svc("--home", tmp_path / "home", "estimate", recipe, "--set", "method=qlora", "--json")
    assert ended.code == 0
    content = json.loads(ended.out)
    assert content["base"]["parameters"] == 68_976_648_192
    assert content["learning_rate"] == 1.3e-4
    assert {device["name"]: device["fits"] for device in content["devices"]} == {
        "here": False,
        "rtx-3090": False,
        "rtx-4090": False,
        "a100-40": False,
        "a100-80": True,
        "h100": True,
        "h200": True,
    }


def test_estimate_says_whether_training_would_be_refused_on_this_machine(
    svc: Svc, tmp_path: Path, recipe: Path
) -> None:
    def refused(*options: str) -> str | None:
        ended = svc("--home", tmp_path / "home", "estimate", recipe, *options, "--json")
        text: str | None = json.loads(ended.out)["refused"]
        return text

    assert "short" in (refused("--set", "method=full", "--device", "here") or "")
    assert refused("--set", f"base={FOLDER / 'llama-3.2-1b'}", "--device", "here") is None
    assert refused("--set", "method=full", "--device", "h100") is None


def test_estimate_of_a_preference_recipe_counts_both_answers_of_each_pair(
    svc: Svc, tmp_path: Path, recipe: Path
) -> None:
    tokens = {}
    pairs = [PreferencePair(chat(f"question {number}"), chat(f"question {number}", "no")) for number in range(40)]
    for objective in ("sft", "dpo"):
        if objective == "dpo":
            write_pairs(tmp_path / "train.jsonl", pairs)
        command = ("estimate", recipe, "--set", f"objective={objective}", "--device", "here", "--json")
        tokens[objective] = json.loads(svc("--home", tmp_path / "home", *command).out)["data"]["tokens"]
    assert tokens["dpo"] > 1.5 * tokens["sft"]


def test_estimate_says_what_to_change_when_the_chosen_device_is_too_small(
    svc: Svc, tmp_path: Path, recipe: Path
) -> None:
    ended = svc("--home", tmp_path / "home", "estimate", recipe, "--device", "a100-80", "--device", "h200")
    assert ended.code == 0
    assert "A100 80 GB: fits with quantization=nf4" in ended.out
    assert "learning rate 0.00013, the default for a hidden width of 8,192" in ended.out
    assert "RTX 4090" not in ended.out


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (["adapter.init=pissa_niter_16"], "; PiSSA's authors used about a tenth of LoRA's rate"),
        (["train.lora_plus_ratio=8"], "; LoRA+'s authors advise about half of LoRA's rate"),
        (["adapter.init=pissa", "train.learning_rate=1e-4"], None),
        (["adapter.init=olora"], None),
    ],
)
def test_estimate_quotes_published_advice_on_the_learning_rate_unless_the_recipe_sets_the_rate(
    svc: Svc, tmp_path: Path, recipe: Path, changes: list[str], advice: str | None
) -> None:
    options = [option for change in changes for option in ("--set", change)]
    ended = svc("--home", tmp_path / "home", "estimate", recipe, "--device", "h200", *options)
    assert ("authors" in ended.out, (advice or "") in ended.out) == (advice is not None, True)


def test_estimate_says_what_to_download_when_the_base_has_no_config(svc: Svc, tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = svc("--home", tmp_path / "home", "estimate", recipe, "--set", f"base={tmp_path / 'empty'}")
    assert ended.code == 5
    assert "download config.json" in ended.err


@pytest.mark.parametrize("command", [["train"], ["train", "--curve"], ["sweep"]], ids=" ".join)
def test_training_that_cannot_fit_in_memory_is_refused_before_it_starts(
    svc: Svc, tmp_path: Path, recipe: Path, command: list[str]
) -> None:
    ended = svc("--home", tmp_path / "home", *command, recipe)
    assert ended.code == InsufficientMemoryError.exit_code
    assert "GB short" in ended.err
    assert not {"runs", "sweeps"} & {path.name for path in (tmp_path / "home").glob("*")}


@pytest.mark.parametrize(
    ("memory", "choice"),
    [(2e12, "gradient checkpointing: off (without checkpointing"), (200e9, "gradient checkpointing: on (")],
)
def test_gradient_checkpointing_choice_and_its_reason_are_printed_for_gpu_training(
    svc: Svc, tmp_path: Path, recipe: Path, memory: float, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "this_machine", lambda *_: replace(cpu_device(memory), cpu=False))
    ended = svc("--home", tmp_path / "home", "train", recipe, "--anyway")
    assert choice in " ".join(ended.err.split())
    assert "GB are free)" in " ".join(ended.err.split())


@pytest.mark.parametrize("command", [["train", "--curve"], ["sweep"]], ids=" ".join)
def test_gradient_checkpointing_choice_is_not_printed_for_learning_curves_and_sweeps(
    svc: Svc, tmp_path: Path, recipe: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "this_machine", lambda *_: replace(cpu_device(2e12), cpu=False))
    assert "gradient checkpointing:" not in svc("--home", tmp_path / "home", *command, recipe, "--anyway").err


@pytest.mark.parametrize("command", [["train"], ["train", "--curve"], ["sweep"]], ids=" ".join)
def test_anyway_option_skips_the_memory_check(svc: Svc, tmp_path: Path, recipe: Path, command: list[str]) -> None:
    ended = svc("--home", tmp_path / "home", *command, recipe, "--anyway")
    assert ended.code == 5  # the folder has no weights
    assert "is missing model.safetensors" in ended.err


def test_estimate_uses_the_number_of_devices_set_in_the_recipe(svc: Svc, tmp_path: Path, recipe: Path) -> None:
    arguments = ("estimate", recipe, "--set", "train.devices=4", "--device", "here", "--device", "h200")
    content = json.loads(svc("--home", tmp_path / "home", *arguments, "--json").out)
    assert [(device["label"], device["count"]) for device in content["devices"]] == [
        ("4 x this machine", 4),
        ("4 x H200", 4),
    ]
    assert "the largest batch are per GPU" in svc("--home", tmp_path / "home", *arguments).out
