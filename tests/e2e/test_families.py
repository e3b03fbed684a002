"""Base models of every family that is promised, through all stages of `svc train` on the real engine.

Random weights of a few layers: what differs between families is their layers, not how many there are. Llama is trained
by the main job. SmolLM2 is a Llama, with the tokenizer and template that all of these have; Mistral and Gemma attend
through windows shorter than the examples; Phi-3 fuses its projections; SmolLM3 has a fourth layer without positions.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from examples.service import svc_json
from svc.dataset.readers.reader import read_examples, write_examples
from svc.settings import Settings
from tests.e2e.conftest import DATA, RECIPE, Report
from tests.e2e.tiny_model import FAMILIES, build_tiny_model

pytestmark = [pytest.mark.matrix]

TRAIN_EXAMPLES, HELDOUT_EXAMPLES = 24, 8


@pytest.fixture(scope="module")
def families_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all, with the examples beside it."""
    folder = tmp_path_factory.mktemp("families")
    write_examples(folder / "train.jsonl", read_examples(DATA / "train.jsonl")[:TRAIN_EXAMPLES])
    write_examples(folder / "heldout.jsonl", read_examples(DATA / "heldout.jsonl")[:HELDOUT_EXAMPLES])
    return folder / "home"


def write_recipe(folder: Path, family: str) -> Path:
    """A base model of the family and the recipe that trains it."""
    from trainer.base_model.resolve import resolve_base

    build_tiny_model(
        folder / family, resolve_base("smollm2-135m-instruct", Settings().base_cache).folder, family=family
    )
    recipe = RECIPE.replace("name: tiny", f"name: {family}").replace("base: ./base", f"base: ./{family}")
    path = folder / f"{family}.yaml"
    path.write_text(recipe.replace("{repeats: 3}", "{repeats: 2, restart: false}"), "utf-8")
    return path


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_a_family_is_trained_quantized_and_registered(families_home: Path, report: Report, family: str) -> None:
    started = time.monotonic()
    version = svc_json(families_home, "train", str(write_recipe(families_home.parent, family)))["version"]
    assert version == f"{family}@1"
    shown: Any = svc_json(families_home, "show", version)
    formats, seconds = shown["formats"], time.monotonic() - started
    assert set(formats) == {"adapter", "merged", "gptq"}
    for name in ("merged", "gptq"):
        assert formats[name]["evaluation"]["examples"] == HELDOUT_EXAMPLES
        assert len(formats[name]["probes"]) == HELDOUT_EXAMPLES
    base, merged, gptq = (
        evaluation["nll"]["value"]
        for evaluation in (shown["base_evaluation"], formats["merged"]["evaluation"], formats["gptq"]["evaluation"])
    )
    report(f"{family}: {seconds:.0f} s; nats a token: base {base:.2f}, merged {merged:.2f}, gptq {gptq:.2f}")
    assert merged < base - 1
    # Rounding costs little: an engine that reads a layer wrongly answers as the base does, or worse.
    assert abs(gptq - merged) < (base - merged) / 4
