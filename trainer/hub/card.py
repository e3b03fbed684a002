"""Writes the model card of a version for the Hugging Face Hub.

Everyone with access to the repository can read the card. It therefore contains figures, hashes and training options,
but no example texts, labels, paths, URLs or host names.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from svc.errors import NotFoundError, RefusedError
from svc.registry.adapter import AdapterFacts, read_adapter
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.version import Format
from trainer.report.judged import BASE
from trainer.report.page import signed
from trainer.report.report import Report, gather_report

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
    sections = {
        "": _summary(manifest, format),
        "Evaluation": _evaluation(report, format),
        "Training data": _data(report),
        "Recipe": _recipe(manifest.recipe),
        "Checks": _checks(manifest, format),
        "Use": _use(registry, manifest, format, repo),
        "Libraries": ", ".join(f"{name} {version}" for name, version in manifest.libraries.items()),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text)
    return f"---\n{_metadata(manifest, format)}\n---\n\n# {manifest.id}\n\n{body}\n"


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


def _summary(manifest: Manifest, format: Format) -> str:
    origin, base = manifest.base.origin, hub_base(manifest)
    if base:
        origin = f"[{base}](https://huggingface.co/{base})"
    elif "@" in origin:
        origin = "A previously fine-tuned model"
    elif origin.startswith((".", "/", "~")) or origin.endswith(".gguf"):
        origin = "A model that is not on the Hub"
    if parts := _combined(manifest.recipe):
        how = f", with a combination of {len(parts)} adapters"
    elif manifest.imported_adapter:
        how = ", with an adapter that was trained elsewhere"
    else:
        how = f", fine-tuned on {manifest.data.train_examples:,} examples"
    licence = manifest.base.licence or "unknown: its publisher states none"
    return (
        f"{origin}{how}. This repository contains the format `{format}`, registered on "
        f"{manifest.created_at:%Y-%m-%d}.\n\nLicense of the base: {licence}."
    )


def _evaluation(report: Report, format: Format) -> str:
    """Return the metrics of the base and the version, with the changes from the base."""
    manifest, judged = report.manifest, report.judged
    models = [model for model in judged.evaluations if model in (BASE, Format.MERGED, format)]
    if not judged.rows or not models:
        return "This version was not evaluated."
    rows = [
        [row.title, *(str(row.estimates.get(model, "")) for model in models)]
        + [signed(row.changes[model]) if model in row.changes else "" for model in models if model != BASE]
        for row in judged.rows
    ]
    changes = [f"change of {model}" for model in models if model != BASE]
    text = (
        f"On {manifest.judged_examples:,} held-out examples, which are not published. The first metric is the primary "
        "one. Values have 95% confidence intervals; changes are relative to the base, paired by example."
    )
    if selection := manifest.data.selection:
        text += f" Note: {selection}."
    if format not in (*models, Format.ADAPTER):
        text += f" The format `{format}` itself was not evaluated; its weights were compared with the merged ones."
    lines = [text, _table(["metric", *models, *changes], rows)]
    if forgetting := manifest.forgetting.get(format) or manifest.forgetting.get(Format.MERGED):
        lines.append(
            f"General questions ({forgetting.examples}) answered correctly: {forgetting.before} by the base, "
            f"{forgetting.after} by this model, a change of {signed(forgetting.difference)}."
        )
    return "\n\n".join(lines)


def _data(report: Report) -> str:
    """Return the model card's section on the data: the number of examples in each split and, except for validation,
    their hash.
    """
    data = report.manifest.data
    rows = [
        ["held out", f"{data.heldout_examples:,}", f"`{data.heldout_fingerprint}`"],
    ]
    if data.train_examples:
        rows.insert(0, ["training", f"{data.train_examples:,}", f"`{data.train_fingerprint}`"])
    if data.validation_examples:
        rows.append(["validation", f"{data.validation_examples:,}", ""])
    text = "The examples are not published. Their hashes identify them to those who have them."
    if report.run.steps:
        text += f" The training took {report.run.steps:,} steps and {report.run.tokens:,} tokens."
    return f"{text}\n\n{_table(['examples', 'number', 'hash'], rows)}"


def _recipe(recipe: Mapping[str, Any]) -> str:
    """Return the model card's section on training: the options and, if adapters were combined, a list of them."""
    text = ""
    if parts := _combined(recipe):
        combine = recipe["adapter"]["combine"]
        text = f"Adapters combined with the method `{combine['method']}`:\n\n" + "\n".join(
            f"- {part}" for part in parts
        )
        text += "\n\n"
    return text + _table(["key", "value"], [[f"`{key}`", value] for key, value in training_options(recipe).items()])


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


def _checks(manifest: Manifest, format: Format) -> str:
    """Return the results of the parity checks, and the sizes of all formats."""
    rows = [[f"`{name}`", f"{record.bytes / 1e6:,.0f} MB"] for name, record in manifest.formats.items()]
    table = _table(["format of this version", "size"], rows)
    if manifest.parity is None:
        return table
    checks, differences = manifest.parity.checks, manifest.parity.differences.items()
    passed = sum(check.passed for check in checks)
    lines = [
        f"Before registration, the files were compared with the trained model: {passed} of {len(checks)} checks passed "
        f"({', '.join(check.name for check in checks)}).",
        "\n".join(
            f"- {name}: mean difference of {difference.mean:.4f} nats per token, same top-1 token at "
            f"{difference.agreement:.1%} of the positions of {manifest.parity.examples} examples"
            for name, difference in differences
        ),
        table,
    ]
    return "\n\n".join(line for line in lines if line)


def _use(registry: Registry, manifest: Manifest, format: Format, repo: str) -> str:
    """Return commands and code for running the model. For a private repository, HF_TOKEN must also be set."""
    if format is Format.GGUF:
        return _code("sh", [f"llama-server -hf {repo}", f"ollama run hf.co/{repo}"])
    if format is Format.ADAPTER:
        return _use_adapter(_servable_adapter(registry, manifest), hub_base(manifest), repo)
    lines = _code("sh", [f"vllm serve {repo}"])
    if format is Format.MERGED:
        script = [
            "from transformers import pipeline",
            "",
            f'chat = pipeline("text-generation", model="{repo}")',
            'print(chat([{"role": "user", "content": "..."}], return_full_text=False))',
        ]
        lines += "\n\n" + _code("python", script)
    return lines


def _use_adapter(facts: AdapterFacts | None, base: str | None, repo: str) -> str:
    name = base or "BASE"
    script = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), "{repo}")',
    ]
    text = _code("python", script)
    if facts is not None:
        rank = next((size for size in _LORA_RANKS if size >= facts.rank), facts.rank)
        command = f"vllm serve {name} --enable-lora --max-lora-rank {rank} --lora-modules {repo.split('/')[1]}={repo}"
        if kwargs := dict(facts.base.template_kwargs):
            command += f" --default-chat-template-kwargs '{json.dumps(kwargs)}'"
        text = _code("sh", [command]) + "\n\n" + text
    return text if base else f"{text}\n\n`BASE` is the model that was fine-tuned. Its Hub id is not recorded."


def _servable_adapter(registry: Registry, manifest: Manifest) -> AdapterFacts | None:
    """Return the properties of a version's adapter, or None if vLLM cannot apply it or its base is not on this
    machine.
    """
    try:
        return read_adapter(registry, manifest.id)
    except (NotFoundError, RefusedError):
        return None


def _code(language: str, lines: Iterable[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
