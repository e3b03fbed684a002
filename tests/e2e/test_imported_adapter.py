"""Tests on the real engine that an adapter trained with TRL and PEFT alone becomes a version and is served."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from examples.service import serving, svc_json
from tests.e2e.conftest import Report

pytestmark = [pytest.mark.matrix]

PORT = 8747
TRAINING = """
import sys
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

base, data, out = sys.argv[1:]
trainer = SFTTrainer(
    base,
    args=SFTConfig(out, max_steps=8, learning_rate=1e-2, per_device_train_batch_size=4, use_cpu=True, bf16=False,
                   report_to="none", save_strategy="no", logging_steps=1),
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
    out = workplace / "trl-adapter"
    script = [sys.executable, "-c", TRAINING, str(workplace / "base"), str(workplace / "train.jsonl"), str(out)]
    subprocess.run(script, check=True, cwd=workplace)
    return out


def test_adapter_of_trl_is_imported_compared_evaluated_and_served(
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
    with (
        serving(home, imported["version"], PORT) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        messages: Any = [{"role": "user", "content": "hello"}]
        raw = client.chat.completions.with_raw_response.create(model="imported", messages=messages, max_tokens=8)
    assert raw.headers["x-model-version"] == imported["version"]
    assert raw.parse().choices[0].message.content
