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
