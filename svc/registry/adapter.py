"""Describes a version's adapter and says whether vLLM can apply it to its base at run time.

vLLM supports LoRA and rsLoRA (vllm/lora/peft_helper.py). Versions with any other kind of adapter are
served merged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svc.errors import NotFoundError, RefusedError
from svc.files.json_file import read_json_object
from svc.model_folder.chat_template import (
    TemplateValue,
    choose_template_kwargs,
    pin_date,
    read_chat_template,
)
from svc.registry.registry import Registry
from svc.version import Format, VersionId

CONFIG_FILE = "adapter_config.json"
_KINDS = {"ADALORA": "AdaLoRA", "VERA": "VeRA"}
_FEATURES = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with a bias",
    "modules_to_save": "LoRA with additional fully trained layers",
    "trainable_token_indices": "LoRA with trained embeddings",
    "target_parameters": "LoRA on the experts of a mixture-of-experts model",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "LoRA with replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
"""Unsupported kinds of adapters, keyed by the PEFT config option that enables them."""
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of `init_lora_weights` that leave the base's weights unchanged, unlike those for PiSSA and OLoRA."""
_NOT_TARGETS = frozenset({"lm_head", "embed_tokens"})
"""Layers that adapters must not change. vLLM would store one output layer per adapter, and its CPU engine
would then crash at the next request for prompt log-probabilities."""


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """Properties that two adapters must share for one engine to apply both.

    Attributes:
        folder: the base model's folder.
        revision: revision that identifies the base's exact files.
        template_kwargs: arguments of the base's chat template.
    """

    folder: Path
    revision: str
    template_kwargs: tuple[tuple[str, TemplateValue], ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """Properties of a version's adapter.

    Attributes:
        folder: folder with the adapter's files.
        rank: largest rank of any layer.
        targets: last parts of the names of the adapted layers, for example `q_proj`.
        bytes: total size of the adapter's files, in bytes.
        failed: checks that the version failed before it was registered.
    """

    version: VersionId
    folder: Path
    base: AdapterBase
    rank: int
    targets: frozenset[str]
    bytes: int
    failed: tuple[str, ...] = ()


def read_adapter(registry: Registry, version: VersionId) -> AdapterFacts:
    """Read the properties of a version's adapter without loading its weights.

    Raises:
        NotFoundError: the version does not exist, or has no adapter, or its base is missing.
        RefusedError: vLLM cannot apply the adapter to its base; the error contains the reason.
        IntegrityError: the adapter's config is missing or damaged.
    """
    folder, manifest = registry.artifact(version, Format.ADAPTER), registry.manifest(version)
    config = read_json_object(folder / CONFIG_FILE)
    if reason := adapter_refusal(config):
        raise _refused(version, reason)
    base = Path(str(config.get("base_model_name_or_path")))
    if not (base / "config.json").is_file():
        raise NotFoundError(
            f"the base model of {version} is no longer in {base}",
            expected="the folder of the base model that the adapter was trained on",
            todo=f"restore {base}, or serve the merged version, which does not need it: --format {Format.MERGED}",
        )
    template = read_chat_template(base) or ""
    if pin_date(template) != template:
        raise _refused(version, "the base's chat template inserts today's date, but training used a fixed date")
    kwargs = choose_template_kwargs(base, manifest.recipe.get("chat_template_kwargs"))
    return AdapterFacts(
        version=version,
        folder=folder,
        base=AdapterBase(base, manifest.base.revision, tuple(sorted(kwargs.items()))),
        rank=max([1, config["r"], *(config.get("rank_pattern") or {}).values()]),
        targets=_targets(config),
        bytes=manifest.formats[Format.ADAPTER].bytes,
        failed=manifest.failed,
    )


def adapter_refusal(config: Mapping[str, Any]) -> str | None:
    """Return the reason why vLLM cannot apply an adapter to its base, or None if it can.

    Args:
        config: the adapter's config, as written by PEFT.
    """
    kind, start = str(config.get("peft_type")), config.get("init_lora_weights", True)
    if kind != "LORA":
        return f"it is {_KINDS.get(kind, kind)}"
    if features := [name for key, name in _FEATURES.items() if config.get(key)]:
        return f"it is {features[0]}"
    if config.get("bias", "none") != "none":
        return "it has trained biases"
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        return f"it was initialized by {start}, which changes the base's weights"
    if not isinstance(config.get("target_modules"), list) or not isinstance(config.get("r"), int):
        return "its config lacks the names of the adapted layers, or the rank"
    if changed := sorted(_NOT_TARGETS & _targets(config)):
        return f"it changes {', '.join(changed)}"
    return None


def _targets(config: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(str(name).rpartition(".")[2] for name in config["target_modules"])


def _refused(version: VersionId, reason: str) -> RefusedError:
    return RefusedError(
        f"{version} cannot be served as an adapter: {reason}",
        expected="LoRA or rsLoRA",
        todo=f"serve it merged: --format {Format.MERGED}",
    )
