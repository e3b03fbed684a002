"""Writes the model card of a version for the Hugging Face Hub.

Everyone with access to the repository can read the card. It therefore contains figures, hashes and training options,
but no example texts, labels, paths, URLs or host names.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svc.errors import NotFoundError, RefusedError
from svc.registry.adapter import AdapterFacts, read_adapter
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.version import Format
from trainer.report.judged import BASE
from trainer.report.page import signed, template_environment
from trainer.report.report import gather_report

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOP_KEYS = ("method", "objective", "quantization", "merge_dequantized", "chat_template_kwargs")
_PRIVATE_KEYS = frozenset({"adapter.trained", "adapter.combine"})
"""Recipe keys whose values may be paths."""
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for its option --max-lora-rank."""


def make_card(registry: Registry, manifest: Manifest, format: Format, repo: str) -> str:
    """Return the README.md of a version's repository, with its metadata block.

    Args:
        format: the format that is uploaded to the repository.
        repo: `org/name`.

    Raises:
        IntegrityError: one of the version's files is missing or was changed.
    """
    report = gather_report(registry, manifest.id)
    judged, adapter = report.judged, _servable_adapter(registry, manifest) if format is Format.ADAPTER else None
    models = [model for model in judged.evaluations if model in (BASE, Format.MERGED, format)] if judged.rows else []
    tuned = [model for model in models if model != BASE]
    metrics = [
        [row.title, *(str(row.estimates.get(model, "")) for model in models)]
        + [signed(row.changes[model]) if model in row.changes else "" for model in tuned]
        for row in judged.rows
    ]
    environment = template_environment(Path(__file__).parent / "templates", autoescape=False)
    return environment.get_template("card.md.jinja").render(
        manifest=manifest,
        metadata=_metadata(manifest, format),
        format=format.value,
        repo=repo,
        run=report.run,
        base=hub_base(manifest),
        origin=_origin(manifest),
        parts=_combined(manifest.recipe),
        models=models,
        columns=["metric", *models, *(f"change of {model}" for model in tuned)],
        metrics=metrics,
        options=[[f"`{key}`", value] for key, value in training_options(manifest.recipe).items()],
        adapter=adapter,
        max_rank=adapter and next((rank for rank in _LORA_RANKS if rank >= adapter.rank), adapter.rank),
        template_kwargs=adapter and json.dumps(dict(adapter.base.template_kwargs)),
    )


def hub_base(manifest: Manifest) -> str | None:
    """Return the Hub id of a version's base, or None if the base is a local model or another version."""
    origin = manifest.base.origin
    return origin if _HUB_ID.fullmatch(origin) else None


def _metadata(manifest: Manifest, format: Format) -> str:
    """Return the YAML block from which the Hub reads the license, the base and the task."""
    from huggingface_hub import ModelCardData

    base, method = hub_base(manifest), manifest.recipe.get("method")
    relation = {Format.ADAPTER: "adapter", Format.MERGED: "finetune"}.get(format, "quantized")
    data = ModelCardData(
        base_model=base,
        license=manifest.base.licence and manifest.base.licence.lower(),
        library_name={Format.ADAPTER: "peft", Format.GGUF: "gguf"}.get(format, "transformers"),
        pipeline_tag="text-generation",
        tags=["tuneserve", *([str(method)] if method else [])],
        base_model_relation=base and relation,
    )
    return str(data.to_yaml())


def _origin(manifest: Manifest) -> str:
    """Return the base's name with its address, or a description of a base that is not on the Hub."""
    origin = manifest.base.origin
    if base := hub_base(manifest):
        return f"[{base}](https://huggingface.co/{base})"
    if "@" in origin:
        return "A previously fine-tuned model"
    is_local = origin.startswith((".", "/", "~")) or origin.endswith(".gguf")
    return "A model that is not on the Hub" if is_local else origin


def training_options(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the recipe keys that describe how the version was trained, except those that name files or servers.

    Keys that are unset or turned off are left out.
    """
    adapter = recipe.get("adapter") or {}
    sections = ["adapter"]
    if not (adapter.get("trained") or adapter.get("combine")):  # the others describe training that did not take place
        sections += ["rope_scaling", "train", "stopping"] + (
            ["preference"] if recipe.get("objective", "sft") != "sft" else []
        )
    values = {key: recipe.get(key) for key in _TOP_KEYS}
    for section in sections:
        values |= {f"{section}.{key}": value for key, value in (recipe.get(section) or {}).items()}
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for key, value in values.items()
        if not (value is None or value is False or value in ([], {}) or key in _PRIVATE_KEYS)
    }


def _combined(recipe: Mapping[str, Any]) -> list[str]:
    """Return the weight and name of each adapter that the recipe combines. An adapter not on the Hub is not named."""
    parts = ((recipe.get("adapter") or {}).get("combine") or {}).get("adapters", ())
    names = [part["adapter"] if _HUB_ID.fullmatch(part["adapter"]) else "an adapter not on the Hub" for part in parts]
    return [f"{part['weight']:g} times {name}" for part, name in zip(parts, names, strict=True)]


def _servable_adapter(registry: Registry, manifest: Manifest) -> AdapterFacts | None:
    """Return the properties of a version's adapter, or None if vLLM cannot apply it or its base is not on this
    machine.
    """
    try:
        return read_adapter(registry, manifest.id)
    except (NotFoundError, RefusedError):
        return None
