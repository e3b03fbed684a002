"""`svc estimate`, and what `svc train` does with it."""

import json
from pathlib import Path

import pytest

from svc.dataset.readers.reader import write_examples
from svc.errors import InsufficientMemoryError
from tests.command_line import Svc
from tests.svc.chats import chat
from tests.trainer.estimate.configs import FOLDER, cpu_device
from trainer.estimate import devices


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a base that is a config alone."""
    monkeypatch.setattr(devices, "this_machine", lambda *_: cpu_device())
    monkeypatch.setattr(devices, "read_capabilities", lambda _: None)
    write_examples(tmp_path / "train.jsonl", [chat(f"question {number}") for number in range(40)])
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: big\nbase: {FOLDER / 'llama-2-70b'}\ndata: {{train: train.jsonl}}\n")
    return path


def test_a_config_alone_is_enough(svc: Svc, tmp_path: Path, recipe: Path) -> None:
    ended = svc("--home", tmp_path / "home", "estimate", recipe, "--set", "method=qlora", "--json")
    assert ended.code == 0
    told = json.loads(ended.out)
    assert told["base"]["parameters"] == 68_976_648_192
    assert {one["name"]: one["fits"] for one in told["devices"]} == {
        "here": False,
        "rtx-3090": False,
        "rtx-4090": False,
        "a100-40": False,
        "a100-80": True,
        "h100": True,
        "h200": True,
    }


def test_devices_can_be_chosen_and_what_does_not_fit_is_told_what_to_change(
    svc: Svc, tmp_path: Path, recipe: Path
) -> None:
    ended = svc("--home", tmp_path / "home", "estimate", recipe, "--device", "a100-80", "--device", "h200")
    assert ended.code == 0
    assert "A100 80 GB: fits with quantization=nf4" in ended.out
    assert "RTX 4090" not in ended.out


def test_a_base_without_a_config_is_told_what_to_download(svc: Svc, tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = svc("--home", tmp_path / "home", "estimate", recipe, "--set", f"base={tmp_path / 'empty'}")
    assert ended.code == 5
    assert "download config.json" in ended.err


@pytest.mark.parametrize("command", [["train"], ["train", "--curve"], ["sweep"]], ids=" ".join)
def test_training_that_cannot_fit_is_refused_before_any_work(
    svc: Svc, tmp_path: Path, recipe: Path, command: list[str]
) -> None:
    ended = svc("--home", tmp_path / "home", *command, recipe)
    assert ended.code == InsufficientMemoryError.exit_code
    assert "GB too few" in ended.err
    assert not {"runs", "sweeps"} & {path.name for path in (tmp_path / "home").glob("*")}


@pytest.mark.parametrize("command", [["train"], ["train", "--curve"], ["sweep"]], ids=" ".join)
def test_anyway_goes_on_to_what_fails_next(svc: Svc, tmp_path: Path, recipe: Path, command: list[str]) -> None:
    ended = svc("--home", tmp_path / "home", *command, recipe, "--anyway")
    assert ended.code == 5  # the folder has no weights
    assert "lacks model.safetensors" in ended.err
