"""Tests `svc train` from the recipe to the version, and that it knows the prompts that earlier versions learned."""

import json
from pathlib import Path

import pytest

from svc.dataset.prompt_hashes import TRAINED_PROMPTS_FILE, hash_prompts, write_prompt_hashes
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.registry.manifest import write_manifest
from svc.registry.registry import HELDOUT_FILE, REFERENCE_FOLDER
from svc.version import VersionId
from tests.command_line import Svc
from tests.svc.chats import chat
from tests.svc.registry.manifests import make_manifest
from tests.trainer.conftest import make_example


@pytest.mark.slow
@pytest.mark.parametrize(("name", "warned"), [("triage", True), pytest.param("other", False, marks=pytest.mark.matrix)])
def test_warning_is_printed_when_an_earlier_version_was_trained_on_the_same_prompts(
    svc: Svc, tmp_path: Path, name: str, warned: bool
) -> None:
    examples = [chat(f"question {number}") for number in range(40)]
    folder = tmp_path / "home" / "models" / "triage" / "1"
    (folder / REFERENCE_FOLDER).mkdir(parents=True)
    write_prompt_hashes(folder / REFERENCE_FOLDER / TRAINED_PROMPTS_FILE, hash_prompts(examples[:39]))
    write_examples(folder / HELDOUT_FILE, examples[39:])
    write_manifest(folder, make_manifest(VersionId("triage", 1), folder))
    write_examples(tmp_path / "train.jsonl", examples)
    (tmp_path / "recipe.yaml").write_text(f"name: {name}\nbase: ./no-such-base\ndata: {{train: train.jsonl}}\n")
    ended = svc("--home", tmp_path / "home", "train", tmp_path / "recipe.yaml")
    assert ended.code != 0
    assert ("an earlier version of triage was trained on them" in " ".join(ended.err.split())) is warned


@pytest.mark.slow
@pytest.mark.matrix
def test_version_is_trained_in_two_processes_when_the_recipe_says_so(
    svc: Svc, tmp_path: Path, tiny_base: Path, examples: list[ChatExample]
) -> None:
    write_examples(tmp_path / "train.jsonl", [*examples, make_example("a number", "black")])
    write_examples(tmp_path / "heldout.jsonl", [make_example("another number", "white")])
    (tmp_path / "recipe.yaml").write_text(
        f"name: tiny\nbase: {tiny_base}\nformats: [adapter]\ndata: {{train: train.jsonl, heldout: heldout.jsonl}}\n"
        "adapter: {rank: 4}\ntrain: {batch_size: 4, epochs: 2, learning_rate: 0.01}\n"
    )
    losses = {}
    for devices in (1, 2):
        home, setting = tmp_path / str(devices), f"train.devices={devices}"
        ended = svc("--home", home, "train", tmp_path / "recipe.yaml", "--set", setting, "--json")
        assert ended.code == 0
        assert json.loads(ended.out)["version"] == "tiny@1"
        assert ("training on 2 processes on the CPU" in " ".join(ended.err.split())) is (devices == 2)
        (path,) = home.glob("runs/*/train.json")
        summary = json.loads(path.read_text("utf-8"))["result"]
        assert summary["devices"] == devices
        losses[devices] = [point["loss"] for point in summary["points"] if point["loss"]]
    assert losses[2] == pytest.approx(losses[1], abs=0.02)  # in the data type of this machine
    adapters = [tmp_path / str(devices) / "models" / "tiny" / "1" / "adapter" for devices in (1, 2)]
    assert len({tuple(sorted(path.name for path in folder.iterdir())) for folder in adapters}) == 1
