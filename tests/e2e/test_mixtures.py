"""Mixtures of experts, trained with their experts, merged, and served to a client by the real engine."""

from pathlib import Path
from typing import Any

import openai
import pytest

from examples.service import serving, svc_json
from svc.dataset.readers.reader import read_examples, write_examples
from svc.settings import Settings
from tests.e2e.conftest import DATA, PROMPTS, RECIPE, Report
from tests.e2e.tiny_model import MIXTURES, build_tiny_model

pytestmark = [pytest.mark.matrix]

PORT = 8744
TRAIN_EXAMPLES, HELDOUT_EXAMPLES = 24, 8


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_served_as_it_was_trained(tmp_path: Path, report: Report, kind: str) -> None:
    from trainer.base_model.resolve import resolve_base

    write_examples(tmp_path / "train.jsonl", read_examples(DATA / "train.jsonl")[:TRAIN_EXAMPLES])
    write_examples(tmp_path / "heldout.jsonl", read_examples(DATA / "heldout.jsonl")[:HELDOUT_EXAMPLES])
    tokenizer = resolve_base("smollm2-135m-instruct", Settings().base_cache).folder
    build_tiny_model(tmp_path / kind, tokenizer, family=kind)
    name = kind.replace("_", "-")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("name: tiny", f"name: {name}").replace("base: ./base", f"base: ./{kind}"), "utf-8")
    options = ("--set", "formats=[merged]", "--set", "qualify.restart=false")
    version = svc_json(tmp_path / "home", "train", str(recipe), *options)["version"]
    shown: Any = svc_json(tmp_path / "home", "show", version)
    base, merged = (
        found["nll"]["value"] for found in (shown["base_evaluation"], shown["formats"]["merged"]["evaluation"])
    )
    report(f"{kind}: nats a token: base {base:.2f}, merged {merged:.2f}")
    assert merged < base - 1
    messages: Any = PROMPTS[0]
    with (
        serving(tmp_path / "home", version, PORT) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        raw = client.chat.completions.with_raw_response.create(model=name, messages=messages, max_tokens=5)
    assert raw.headers["x-model-version"] == version
    assert raw.parse().choices[0].message.content
