"""Creates a home whose only version no engine could load, but with which a server can answer requests."""

import json
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click

from benchmarks.gateway.upstream import MODEL
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample, Message, Role
from svc.engine.device import read_capabilities
from svc.registry.files import record_file, record_files
from svc.registry.manifest import BaseRecord, DataRecord, FormatRecord, Manifest
from svc.registry.registry import HELDOUT_FILE, Registry
from svc.settings.settings import Settings
from svc.version import Format, VersionId

_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 1000,
}


def make_home(home: Path) -> None:
    """Register the version and store the device's capabilities, as the first `svc serve` with a home does."""
    import numpy as np
    from safetensors.numpy import save_file

    settings = Settings.model_validate({"home": home})
    registry = Registry.of(settings)
    run = registry.tracking.start_run(MODEL, {})
    with tempfile.TemporaryDirectory() as folder:
        heldout, model = Path(folder) / HELDOUT_FILE, Path(folder) / Format.MERGED.value
        model.mkdir()
        write_examples(heldout, [ChatExample((Message(Role.USER, "one"), Message(Role.ASSISTANT, "two")))])
        (model / "config.json").write_text(json.dumps(_CONFIG))
        save_file({"weight": np.zeros((4,), dtype=np.float32)}, model / "model.safetensors")
        content = {HELDOUT_FILE: heldout, Format.MERGED.value: model}
        registry.publish(MODEL, run, content, partial(_manifest, run))
    read_capabilities(home)


def _manifest(run: str, version: VersionId, folder: Path) -> Manifest:
    return Manifest(
        name=version.name,
        number=version.number,
        created_at=datetime.now(UTC),
        run="benchmark",
        tracking_run=run,
        base=BaseRecord(origin="none", revision="1", licence=None),
        recipe={},
        data=DataRecord(train_fingerprint="", train_examples=1, heldout_fingerprint="", heldout_examples=1),
        heldout=record_file(folder, folder / HELDOUT_FILE),
        reference=(),
        base_evaluation=None,
        formats={Format.MERGED: FormatRecord(files=record_files(folder, folder / Format.MERGED.value))},
        libraries={},
        failed=(),
        parity=None,
        judge=None,
        findings=(),
        forgetting={},
    )


@click.command()
@click.argument("home", type=click.Path(path_type=Path))
def main(home: Path) -> None:
    """Create the benchmark's home folder at HOME."""
    make_home(home)


if __name__ == "__main__":
    main()
