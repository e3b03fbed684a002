"""Tests on the real engine that adapters of TRL, combined and PiSSA adapters become versions and are served."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import openai
import pytest

from examples.service import serving, svc_json
from tests.e2e.conftest import Report
from tests.e2e.instance import ANY_QUALITY

pytestmark = [pytest.mark.matrix]

PORT = 8747
TRAINING = """
import sys
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

base, data, out, seed = sys.argv[1:]
trainer = SFTTrainer(
    base,
    args=SFTConfig(out, max_steps=8, learning_rate=1e-2, per_device_train_batch_size=4, use_cpu=True, bf16=False,
                   report_to="none", save_strategy="no", logging_steps=1, seed=int(seed)),
    train_dataset=load_dataset("json", data_files=data, split="train").select_columns(["messages"]),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(out)
"""
"""A training script that imports nothing of this project."""


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    """Return the folder to which TRL saved its adapter."""
    return train_with_trl(workplace, "trl-adapter", seed=0)


def train_with_trl(workplace: Path, name: str, seed: int) -> Path:
    out = workplace / name
    arguments = (workplace / "base", workplace / "train.jsonl", out, seed)
    subprocess.run([sys.executable, "-c", TRAINING, *map(str, arguments)], check=True, cwd=workplace)
    return out


@contextmanager
def client_of(home: Path, version: str) -> Iterator[openai.OpenAI]:
    with (
        serving(home, version, PORT) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def answer(client: openai.OpenAI, version: str) -> str:
    """Return the answer of a version, which must be in production."""
    model, messages = version.split("@")[0], [{"role": "user", "content": "hello"}]
    raw = client.chat.completions.with_raw_response.create(model=model, messages=cast(Any, messages), max_tokens=8)
    assert raw.headers["x-model-version"] == version
    return raw.parse().choices[0].message.content or ""


def test_imported_trl_adapter_scores_better_than_its_base_and_is_served(
    workplace: Path, trained: Path, report: Report
) -> None:
    home = workplace / "imported-home"
    sets = [
        part
        for value in ("qualify.restart=false", "evaluate.general=false", "evaluate.max_tokens=8")
        for part in ("--set", value)
    ]
    data, base = str(workplace / "heldout.jsonl"), str(workplace / "base")
    given = ("--name", "imported", "--data", data, "--base", base)
    imported: Any = svc_json(home, "import", str(trained), *given, *sets)
    version: Any = svc_json(home, "show", imported["version"])
    merged = version["formats"]["merged"]
    assert all(check["passed"] for check in version["parity"]["checks"])
    assert len(merged["probes"]) == 8
    before, after = version["base_evaluation"]["nll"]["value"], merged["evaluation"]["nll"]["value"]
    assert after < before
    config = json.loads((Path(imported["folder"]) / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == base
    report(f"adapter of TRL: NLL base {before:.3f}, imported {after:.3f}")
    with client_of(home, imported["version"]) as client:
        assert answer(client, imported["version"])


@pytest.mark.parametrize("kind", ["combined", "pissa"])
def test_imported_adapter_is_evaluated_and_served_both_merged_and_as_an_adapter(
    workplace: Path, trained: Path, report: Report, tmp_path: Path, kind: str
) -> None:
    """An adapter is `verified` if its probes are those of the merged weights, up to rounding."""
    home, recipe = workplace / f"{kind}-home", tmp_path / "recipe.yaml"
    content: dict[str, Any] = {
        "name": kind,
        "base": str(workplace / "base"),
        "formats": ["adapter", "merged"],
        "data": {"heldout": str(workplace / "heldout.jsonl")},
        "qualify": {"restart": False},
        "evaluate": {"general": False, "max_tokens": 8},
    }
    if kind == "combined":
        other = train_with_trl(workplace, "trl-other", seed=1)
        adapters = [{"adapter": str(trained), "weight": 0.7}, {"adapter": str(other), "weight": 0.3}]
        content["adapter"] = {"combine": {"method": "ties", "density": 0.5, "adapters": adapters}}
    else:
        content["adapter"] = {"init": "pissa"}
        content["data"]["train"] = str(workplace / "train.jsonl")
        content["train"] = {"learning_rate": 0.02, "batch_size": 8}
    recipe.write_text(json.dumps(content), "utf-8")
    version: str = svc_json(home, "train", str(recipe))["version"]
    shown: Any = svc_json(home, "show", version)
    assert all(check["passed"] for check in shown["parity"]["checks"])
    before = shown["base_evaluation"]["nll"]["value"]
    after = shown["formats"]["merged"]["evaluation"]["nll"]["value"]
    assert after < before
    report(f"{kind} adapter: NLL base {before:.3f}, tuned {after:.3f}")
    with client_of(home, version) as client:
        assert answer(client, version)
        svc_json(home, "promote", version, "--format", "adapter", *ANY_QUALITY)
        assert answer(client, version)
        (model,) = svc_json(home, "status")["models"]
    assert [{"version": version, "verified": True}] in [engine["adapters"] for engine in model["engines"]]
