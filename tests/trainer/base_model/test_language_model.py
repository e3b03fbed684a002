"""Tests that a multimodal checkpoint's language model computes the same as the checkpoint does for text."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from svc.errors import BaseModelError, DiskSpaceError
from svc.model_folder.weight_files import weight_files
from svc.registry.files import read_headers
from tests.builders.model_configs import change_config
from tests.hub_models.build import build_hub_model
from trainer.base_model.resolve import resolve_base, resolve_config
from trainer.data.chat_template import load_tokenizer, stop_tokens

FAMILIES = ["gemma_3_4b", "mistral_3_1"]


@pytest.fixture(scope="module", params=FAMILIES)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with several weight files. Tests must not change it."""
    return build_hub_model(tmp_path_factory.mktemp(request.param) / request.param, request.param)


def as_saved_since_4_52(published: Path, folder: Path) -> Path:
    """Copy a checkpoint and rename its tensors as transformers has done since 4.52."""
    shutil.copytree(published, folder)

    def rename(text: str) -> str:
        text = re.sub(r"^language_model\.lm_head", "lm_head", text)
        text = re.sub(r"^language_model\.model\.", "model.language_model.", text)
        return re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", text)

    for path in weight_files(folder):
        save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text("utf-8"))
    content["weight_map"] = {rename(name): file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content), "utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("names", ["published", "since 4.52"])
def test_extracted_language_model_has_the_same_logits_as_the_complete_checkpoint(
    published: Path, tmp_path: Path, names: str
) -> None:
    whole = published if names == "published" else as_saved_since_4_52(published, tmp_path / "new")
    stored = {tensor.name for tensor in read_headers(whole)}
    assert any(
        name.startswith("model.language_model." if names == "since 4.52" else "language_model.") for name in stored
    )
    alone = resolve_base(str(whole), tmp_path / "cache").folder
    ids = torch.arange(5, 200).unsqueeze(0)  # longer than Gemma's window of attention
    logits = []
    for loader, folder in ((AutoModelForImageTextToText, whole), (AutoModelForCausalLM, alone)):
        model: Any = loader.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert logits[0].std() > 0.1
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_extracted_folder_contains_only_language_model_files(published: Path, tmp_path: Path) -> None:
    base = resolve_base(str(published), tmp_path)
    names = [tensor.name for tensor in read_headers(base.folder)]
    assert {name.partition(".")[0] for name in names} <= {"model", "lm_head"}
    assert not [name for name in names if "vision" in name or "projector" in name]
    config = json.loads((base.folder / "config.json").read_text("utf-8"))
    whole = json.loads((published / "config.json").read_text("utf-8"))
    assert config["model_type"] == whole["text_config"]["model_type"]
    assert config["torch_dtype"] == "bfloat16"
    assert "vision_config" not in config
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert (base.folder / name).read_bytes() == (published / name).read_bytes()
    stops = stop_tokens(published, load_tokenizer(published))
    assert stop_tokens(base.folder, load_tokenizer(base.folder)) == stops
    assert base.licence
    assert resolve_base(str(published), tmp_path) == base


def test_base_config_for_an_estimate_is_extracted_without_the_weights(published: Path, tmp_path: Path) -> None:
    """This is for `svc estimate`, which reads no weights."""
    folder = resolve_config(str(published), tmp_path)
    assert json.loads((folder / "config.json").read_text("utf-8"))["model_type"] != "gemma3"
    assert weight_files(folder) == []


@pytest.mark.slow
def test_checkpoint_with_tensors_of_an_unknown_component_is_rejected(published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "base"))
    path = weight_files(folder)[0]
    save_file(load_file(path) | {"audio_tower.conv.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"contains tensor 'audio_tower\.conv\.weight'"):
        resolve_base(str(folder), tmp_path / "cache")


def test_disk_space_error_says_how_much_space_is_missing(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(DiskSpaceError, match=r"needs up to \d+ MB"):
        resolve_base(str(published), tmp_path)
    assert not list((tmp_path / "language_models").iterdir())


@pytest.mark.parametrize(
    ("model_type", "text", "reason"),
    [
        ("llama4", "llama4_text", "mixture of experts"),
        ("qwen3_5", "qwen3_5_text", "linear attention"),
        (
            "mistral3",
            "ministral3",
            "extracting the language model from model_type 'mistral3' with 'ministral3' is not tested",
        ),
        ("gemma3n", "gemma3n_text", "extracting the language model from model_type 'gemma3n' with"),
    ],
)
def test_unsupported_multimodal_model_family_is_rejected_with_the_reason(
    tiny_base: Path, tmp_path: Path, model_type: str, text: str, reason: str
) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    change_config(folder, model_type=model_type, text_config={"model_type": text}, vision_config={"hidden_size": 8})
    for resolve in (resolve_base, resolve_config):
        with pytest.raises(BaseModelError, match=reason) as raised:
            resolve(str(folder), tmp_path)
        assert "Gemma 3" in raised.value.expected
