"""Tests that `svc train` knows the prompts earlier versions learned before it reads the examples."""

from pathlib import Path

import pytest

from svc.dataset.prompt_hashes import TRAINED_PROMPTS_FILE, hash_prompts, write_prompt_hashes
from svc.dataset.readers.reader import write_examples
from svc.registry.manifest import write_manifest
from svc.registry.registry import HELDOUT_FILE, REFERENCE_FOLDER
from svc.version import VersionId
from tests.command_line import Svc
from tests.svc.chats import chat
from tests.svc.registry.manifests import make_manifest


@pytest.mark.slow
@pytest.mark.parametrize(("name", "warned"), [("triage", True), ("other", False)])
def test_prompts_trained_on_by_earlier_versions_are_known_when_reading_data(
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
