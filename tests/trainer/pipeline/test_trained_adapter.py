"""Tests adapters that other programs trained: what is refused, and that an accepted one becomes a version."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.errors import BaseModelError, RecipeError
from svc.registry.adapter import adapter_refusal
from svc.version import Format
from tests.builders.peft_adapters import train_with_peft
from tests.command_line import Svc
from tests.trainer.conftest import make_model, make_recipe
from tests.trainer.pipeline.stand_ins import Make, Stages
from trainer.evaluation.parity.adapter import compare
from trainer.export.merge import merge_adapter
from trainer.model.peft_config import load_adapter
from trainer.model.stored_weights import StoredWeights
from trainer.pipeline.trained_adapter import check_fits, find_adapter, refusal
from trainer.recipe.adapter import AdapterType
from trainer.recipe.stage import Stage

# The keys that differ from PEFT's defaults in adapters which other people published on GitHub.
TINYLLAMA = {  # ABISHEAK-std/TinyLlama-structured-output-finetuned-using-Lora, written by PEFT 0.19.1
    "base_model_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "bias": "none",
    "init_lora_weights": True,
    "lora_alpha": 32,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 16,
    "target_modules": ["o_proj", "v_proj", "gate_proj", "down_proj", "k_proj", "q_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
FLAN_T5 = TINYLLAMA | {  # 3L0L0/FLAN-T5-Motivation-Model, written by PEFT 0.18.1
    "base_model_name_or_path": "google/flan-t5-base",
    "target_modules": ["o", "k", "q", "v"],
    "task_type": "SEQ_2_SEQ_LM",
}


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter trained by PEFT, which tests must not change."""
    return train_with_peft(tiny_base, tmp_path_factory.mktemp("peft") / "adapter")


def test_published_adapter_config_of_a_chat_model_is_accepted() -> None:
    assert refusal(TINYLLAMA) is None
    assert adapter_refusal(TINYLLAMA) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FLAN_T5, "its task_type is SEQ_2_SEQ_LM"),
        (TINYLLAMA | {"modules_to_save": ["lm_head"]}, "it is LoRA with additional fully trained layers"),
        (TINYLLAMA | {"init_lora_weights": "pissa"}, "it was initialized by pissa, which changes the base's weights"),
        (TINYLLAMA | {"peft_type": "IA3"}, "it is IA3"),
        (TINYLLAMA | {"bias": "all"}, "it has trained biases"),
        (TINYLLAMA | {"target_modules": ["q_proj", "lm_head"]}, "it changes lm_head"),
        (TINYLLAMA | {"lora_alpha": 0.5}, "its lora_alpha is 0.5, which is not a positive whole number"),
    ],
)
def test_unmergeable_adapter_is_rejected_based_on_its_config(config: dict[str, Any], reason: str) -> None:
    assert refusal(config) == reason


def test_adapters_that_use_dora_or_a_pattern_of_target_modules_are_accepted_for_merging() -> None:
    assert refusal(TINYLLAMA | {"use_dora": True}) is None
    assert refusal(TINYLLAMA | {"target_modules": r".*\\.(q_proj|v_proj)$"}) is None


def test_adapter_with_pickled_weights_is_rejected(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(BaseModelError, match=r"only adapter_model\.bin, a pickle file"):
        find_adapter(str(tmp_path), tmp_path)


def test_only_config_and_safetensors_of_a_hub_adapter_are_downloaded(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "training_args.bin", "run.py"]
    fetched: list[str] = []

    def snapshot_download(name: str, **options: Any) -> str:
        assert name == "org/adapter"
        fetched.extend(filter_repo_objects(listed, allow_patterns=options["allow_patterns"]))
        return str(plain)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    adapter = find_adapter("org/adapter", tmp_path)
    assert adapter.origin == "org/adapter"
    assert adapter.folder == plain
    assert fetched == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.slow
def test_adapter_trained_with_plain_peft_is_merged_exactly(tiny_base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = find_adapter(str(plain), tmp_path)
    check_fits(tiny_base, adapter)
    adapter.copy_to(tmp_path / "adapter", tiny_base)
    merge_adapter(tiny_base, tmp_path / "adapter", tmp_path / "merged")
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), plain)
    applied = compare(model, StoredWeights(tmp_path / "merged"))
    assert applied.wrong is None
    assert applied.off == 0


@pytest.mark.slow
def test_adapter_error_names_the_first_tensor_that_does_not_fit_the_base(plain: Path, tmp_path: Path) -> None:
    wider = make_model(tmp_path / "wider", hidden_size=128)
    with pytest.raises(BaseModelError, match=r"layers.0.self_attn.q_proj.lora_A.weight of shape \[4, 64\].*\[4, 128\]"):
        check_fits(wider, find_adapter(str(plain), tmp_path))
    shallower = make_model(tmp_path / "shallower", num_hidden_layers=1)
    with pytest.raises(BaseModelError, match=r"has tensor .*layers.1.self_attn.q_proj.*no layer of this base"):
        check_fits(shallower, find_adapter(str(plain), tmp_path))


@pytest.mark.slow
def test_recipe_for_an_imported_adapter_has_the_settings_of_that_adapter(tiny_base: Path, tmp_path: Path) -> None:
    folder = train_with_peft(tiny_base, tmp_path / "dora", use_dora=True, target_modules=r".*\.(q_proj|up_proj)$")
    adapter = find_adapter(str(folder), tmp_path)
    check_fits(tiny_base, adapter)
    described = adapter.describe(make_recipe(adapter={"trained": str(folder)}))
    assert described.adapter_type is AdapterType.DORA
    assert (described.rank, described.alpha, described.adapter.targets) == (4, 8, ("q_proj", "up_proj"))
    with pytest.raises(RecipeError, match=r"adapter\.rank is 8, but adapter .* has 4"):
        adapter.describe(make_recipe(adapter={"trained": str(folder), "rank": 8}))
    adapter.copy_to(tmp_path / "copy", tiny_base)
    copied = json.loads((tmp_path / "copy" / "adapter_config.json").read_text("utf-8"))
    assert "model.layers.1.mlp.up_proj" in copied["target_modules"]
    assert copied["base_model_name_or_path"] == str(tiny_base)


@pytest.mark.parametrize(
    ("named", "base"),
    [("org/name", "org/name"), ("/home/someone/model", None), (None, None), ("../../etc/model", None)],
)
def test_base_named_in_an_adapter_config_is_used_only_if_it_is_a_hub_id(
    plain: Path, tmp_path: Path, named: str | None, base: str | None
) -> None:
    adapter = find_adapter(str(plain), tmp_path)
    assert replace(adapter, config=dict(adapter.config) | {"base_model_name_or_path": named}).base == base


def test_warning_is_printed_when_the_base_differs_from_the_base_named_in_the_adapter_config(
    plain: Path, tmp_path: Path
) -> None:
    adapter = replace(find_adapter(str(plain), tmp_path), config=TINYLLAMA)
    assert adapter.check_base("TinyLlama/TinyLlama-1.1B-Chat-v1.0") is None
    assert "names the base TinyLlama/TinyLlama-1.1B-Chat-v1.0" in (adapter.check_base("./other") or "")


@pytest.mark.slow
def test_imported_adapter_goes_through_all_pipeline_stages_except_training(
    make: Make, stages: Stages, plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trainer.pipeline.stages.check_fits", lambda base, adapter: None)  # the base is a stand-in
    adapter = find_adapter(str(plain), tmp_path)
    pipeline = replace(make(adapter={"trained": str(plain)}, formats=["merged"]), trained=adapter)
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert stages.ran == [Stage.MERGE]
    assert stages.compared == [[Format.MERGED]]
    assert manifest.imported_adapter == str(plain)
    assert manifest.formats[Format.MERGED].evaluation is not None
    stored = pipeline.registry.artifact(manifest.id, Format.ADAPTER) / "adapter_model.safetensors"
    assert stored.read_bytes() == (plain / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_import_command_registers_an_adapter_with_its_report(
    svc: Svc, tmp_path: Path, tiny_base: Path, plain: Path, examples: list[ChatExample]
) -> None:
    write_examples(tmp_path / "heldout.jsonl", examples)
    home, data = tmp_path / "home", tmp_path / "heldout.jsonl"
    without_base = svc("--home", home, "import", plain, "--name", "tiny", "--data", data)
    assert without_base.code == RecipeError.exit_code
    assert "specify that base with --base" in without_base.err
    given = ("import", plain, "--name", "tiny", "--data", data, "--base", tiny_base, "--format", "adapter", "--json")
    ended = svc("--home", home, *given)
    assert ended.code == 0, ended.err
    folder = Path(json.loads(ended.out)["folder"])
    assert load_file(folder / "adapter" / "adapter_model.safetensors").keys()
    report = svc("--home", home, "report", "tiny@1", "--output", tmp_path / "report.html")
    assert report.code == 0, report.err
    assert "too little data" not in svc("--home", home, "show", "tiny@1").out
    assert "trained elsewhere" in (tmp_path / "report.html").read_text("utf-8")
