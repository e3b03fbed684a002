"""Runs base models of every family, in the hub's layout, through all `svc train` stages on the real engine.

The models have a few layers of random weights, because families differ in the kinds of their layers
rather than their number. Gemma's attention windows are shorter than the examples; Phi-3 fuses its
projections; SmolLM3's fourth layer has no positions. Families use their real tokenizer if it was
downloaded.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from examples.service import serving, svc_json
from svc.dataset.readers.reader import read_examples, write_examples
from svc.dataset.schema.example import ChatExample, Role
from tests.e2e.conftest import DATA, RECIPE, Report
from tests.hub_models.base_models import build_base_model
from tests.hub_models.build import build_hub_model
from tests.hub_models.family import FAMILIES, Family
from tests.hub_models.tokenizer import fetched_tokenizer, smollm2_folder

pytestmark = [pytest.mark.matrix]

PORT = 8744
TRAIN_EXAMPLES, HELDOUT_EXAMPLES = 24, 8


def read_without_system_turns(name: str, count: int) -> list[ChatExample]:
    """Return examples without system turns, which the templates of Gemma 2 and Mistral reject."""
    examples = read_examples(DATA / name)[:count]
    return [
        replace(example, messages=tuple(turn for turn in example.messages if turn.role is not Role.SYSTEM))
        for example in examples
    ]


@pytest.fixture(scope="module")
def families_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the home of all versions, with the examples and a cache of base models next to it."""
    smollm2_folder()  # from the user's cache
    folder = tmp_path_factory.mktemp("families")
    write_examples(folder / "train.jsonl", read_without_system_turns("train.jsonl", TRAIN_EXAMPLES))
    write_examples(folder / "heldout.jsonl", read_without_system_turns("heldout.jsonl", HELDOUT_EXAMPLES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVC_BASE_CACHE", str(folder / "cache"))
        yield folder / "home"


def write_recipe(folder: Path, family: Family, name: str, template: str | None) -> Path:
    """Build a base model of the family and return the recipe that trains it.

    Args:
        template: chat template in the recipe, for a base without one; None uses the family's own template.
    """
    if template is None:
        build_hub_model(folder / name, family.name, tokenizer=fetched_tokenizer(family))
    else:
        build_base_model(folder / name, family.name)
    recipe = RECIPE.replace("name: tiny", f"name: {name}").replace("base: ./base", f"base: ./{name}")
    recipe += f"chat_template: {template}\n" if template else ""
    path = folder / f"{name}.yaml"
    path.write_text(recipe.replace("{repeats: 3}", "{repeats: 2, restart: false}"), "utf-8")
    return path


def quantizes(family: Family) -> bool:
    """Return whether a family has a GPTQ format on this machine. See docs/base_models.md."""
    import torch

    amx = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
    return not family.is_mixture or (family.name == "qwen3_moe" and amx)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_model_trained_from_a_published_base_of_each_family_is_registered_and_served(
    families_home: Path, report: Report, family: Family
) -> None:
    train_and_ask(families_home, report, family, None)


@pytest.mark.parametrize(("family", "template"), [("llama_2", "chatml"), ("phi_2", "alpaca")])
def test_base_without_chat_template_is_served_with_the_recipes_template(
    families_home: Path, report: Report, family: str, template: str
) -> None:
    train_and_ask(families_home, report, FAMILIES[family], template)


def train_and_ask(families_home: Path, report: Report, family: Family, template: str | None) -> None:
    name = "-".join([*family.name.split("_"), *([template] if template else [])])
    started = time.monotonic()
    options = ["--set", f"train.epochs={family.epochs}"]
    options += [] if quantizes(family) else ["--set", "formats=[merged]"]
    recipe = write_recipe(families_home.parent, family, name, template)
    version = svc_json(families_home, "train", str(recipe), *options)["version"]
    seconds = time.monotonic() - started
    assert version == f"{name}@1"
    shown: Any = svc_json(families_home, "show", version)
    served = {format: shown["formats"][format] for format in ("merged", "gptq") if format in shown["formats"]}
    assert set(served) == ({"merged", "gptq"} if quantizes(family) else {"merged"})
    for format in served.values():
        assert format["evaluation"]["examples"] == HELDOUT_EXAMPLES
        assert len(format["probes"]) == HELDOUT_EXAMPLES
    nll = {"base": shown["base_evaluation"]["nll"]["value"]}
    nll |= {format: content["evaluation"]["nll"]["value"] for format, content in served.items()}
    tokenizer = "its own tokenizer" if fetched_tokenizer(family) else "a substitute tokenizer"
    figures = ", ".join(f"{format} {value:.2f}" for format, value in nll.items())
    report(f"{name}: {seconds:.0f} s, {tokenizer}; nats per token: {figures}")
    assert nll["merged"] < nll["base"] - 1
    # Rounding costs little: an engine that reads a layer wrongly answers like the base, or worse.
    assert abs(nll.get("gptq", nll["merged"]) - nll["merged"]) < (nll["base"] - nll["merged"]) / 4
    with (
        serving(families_home, version, PORT) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        raw = client.chat.completions.with_raw_response.create(
            model=name, messages=[{"role": "user", "content": "Which section has package curl?"}], max_tokens=5
        )
    assert raw.headers["x-model-version"] == version
    answer = raw.parse()
    assert answer.usage
    if template:
        assert "<|im_" not in str(answer.choices[0].message.content)
