"""Creates bad versions, as accidents and attackers would, to show that the server refuses them.

This bypasses the registry, which cannot create such versions.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from svc.registry.files import record_files
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.manifest import MANIFEST_FILE
from svc.version import Format


def alter_weights(source: Path, target: Path, format: str) -> None:
    """Copy a version and change a few bytes in the middle of its weights, leaving the manifest unchanged.

    Args:
        source: folder of the version, .../NAME/N.
        target: folder of the bad version, .../NAME/M.
    """
    _copy(source, target)
    weights = target / format / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\x42" * 64)


def replace_weights(source: Path, target: Path, format: str, weights_of: Path) -> None:
    """Copy a version, replace its weights with those of another version, and recompute the manifest's hashes."""
    _copy(source, target)
    shutil.copyfile(weights_of / format / "model.safetensors", target / format / "model.safetensors")
    manifest = _read(target)
    files = record_files(target, target / format)
    manifest["formats"][format]["files"] = [file.model_dump() for file in files]
    _write(target, manifest)


def replace_by_base(source: Path, target: Path, base: Path) -> None:
    """Copy a version with the weights of its base and the probes of these weights. Its metrics are good, but its
    answers are bad.

    The manifest still has the metrics of the fine-tuned model, as after an evaluation of the wrong model.

    Args:
        base: folder of the base model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _copy(source, target)
    merged = target / Format.MERGED.value
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(merged)
    model = model.float()
    manifest = _read(target)
    format = manifest["formats"] = {Format.MERGED.value: manifest["formats"][Format.MERGED.value]}
    record = format[Format.MERGED.value]
    for probe in record["probes"]:
        ids = torch.tensor([probe["token_ids"]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        probe["logprobs"] = scores.gather(1, ids[0, 1:, None])[probe["start"] - 1 :, 0].tolist()
        probe["engine"]["vllm"] = "0.0.0"  # as from another kind of engine: recorded again on this one
    record["files"] = [file.model_dump() for file in record_files(target, merged)]
    record["fingerprint"] = compatibility_fingerprint(merged)
    _write(target, manifest)


def replace_template(source: Path, target: Path, template: str) -> None:
    """Copy a version with a different chat template, and recompute the manifest's hashes and fingerprints."""
    _copy(source, target)
    manifest = _read(target)
    for name, format in manifest["formats"].items():
        (target / name / "chat_template.jinja").write_text(template, "utf-8")
        format["files"] = [file.model_dump() for file in record_files(target, target / name)]
        if format["fingerprint"]:
            format["fingerprint"] = compatibility_fingerprint(target / name)
    _write(target, manifest)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    manifest = _read(target)
    manifest["number"] = int(target.name)
    _write(target, manifest)


def _read(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest), "utf-8")
