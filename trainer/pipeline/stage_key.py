"""Computes the keys of a run's stages. A key is a short hash of everything that affects the stage's result.

A key covers the stage's inputs: recipe values, data, and the keys of the earlier stages whose files it reads. A change
to `quantize` therefore does not cause training, merging or the evaluation of the merged model to be repeated. Answers
are scored and compared with limits when the version is registered, so the evaluation is not repeated after a change to
metrics or limits.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svc.version import QUANTIZED_FORMATS, Format
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples, fingerprint_preferences
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import QUALIFY_STAGES, QUANTIZE_STAGES, Stage
from trainer.recipe.train import DEVICE_KEYS

_LIMITS = ("max_gptq_loss", "max_gptq_nll", "max_forgetting", "undecided")
_METRICS = ("metrics", "primary", "json_schema", "metric_seconds")
"""Keys of the `evaluate` section that define metrics. Like the keys in `_LIMITS`, they affect only the registration."""

_GENERAL = ("general", "general_limit")
"""Keys of the `evaluate` section that specify the general questions. The questions themselves are hashed instead of
these keys."""
StageKeys = Mapping[Stage, str]


def stage_keys(recipe: Recipe, base: Base, examples: Examples, trained: str | None = None) -> StageKeys:
    """Return the keys of a run's stages, keyed by stage.

    Data paths, the checkpoint interval and the held-out loss curve are excluded, because they do not affect the result.
    For preference objectives, however, the held-out curve is included, because the held-out examples must be scored
    before training. Devices are also excluded, because they affect only rounding. A run can therefore resume on other
    devices.

    Args:
        trained: hash of an adapter that is not trained in this run. Its path is excluded.
    """
    content = recipe.model_dump(mode="json")
    prefers = recipe.objective.is_preference
    measured = examples.measured_fingerprint if prefers or recipe.stopping.measures else None
    adapter = content["adapter"] | {"type": recipe.adapter_type}  # `method` only names this type and the quantization
    for key in ("trained", "combine"):
        adapter.pop(key)
    if not adapter["modules_to_save"]:
        adapter.pop("modules_to_save")
    if adapter["init"] is None:  # so that runs started before this key existed can resume
        adapter.pop("init")
    if not prefers:
        content["stopping"].pop("curve")
    content["train"] = {key: value for key, value in content["train"].items() if key not in DEVICE_KEYS}
    if content["train"]["lora_plus_ratio"] is None:
        content["train"].pop("lora_plus_ratio")
    training = [content[key] for key in ("chat_template_kwargs", "train", "stopping")]
    learnt = [adapter, recipe.base_quantization, *training]
    preference = [recipe.objective, content["preference"]] if prefers else []
    train = _key(base.revision, examples.train_fingerprint, measured, learnt, *preference)
    train = _key(train, trained) if trained else train
    merge = _key(train, "dequantized") if recipe.merge_dequantized else _key(train)
    asked = {key: value for key, value in content["evaluate"].items() if key not in _LIMITS + _METRICS + _GENERAL}
    pairs = [fingerprint_preferences(examples.pairs)] if prefers else []
    evaluated = [examples.heldout_fingerprint, asked, content["qualify"], *pairs]
    questions = [examples.questions.fingerprint] if examples.questions else []
    evaluate = _key(merge, evaluated, *questions)
    options: dict[Format, Any] = {
        Format.GPTQ: content["quantize"],
        Format.AWQ: [Format.AWQ, content["quantize"]["group_size"], content["quantize"]["samples"]],
    }
    quantize = {format: _key(merge, options.get(format, format)) for format in QUANTIZED_FORMATS}
    qualify = {format: _key(quantize[format], evaluated, *questions) for format in QUANTIZED_FORMATS}
    others = [qualify[format] for format in recipe.formats if format in qualify and format is not Format.GPTQ]
    parity = _key(evaluate, qualify[Format.GPTQ], content["formats"], *others)
    judge = _key(evaluate, content["judge"]["url"], content["judge"]["model"])
    compared = [judge] if recipe.judge.url else []
    limits = [content["evaluate"][key] for key in _LIMITS + _METRICS]
    metrics = [_content(path) for path in recipe.evaluate.metric_files]
    return {
        Stage.TRAIN: train,
        Stage.MERGE: merge,
        Stage.EVALUATE: evaluate,
        **{QUANTIZE_STAGES[format]: key for format, key in quantize.items()},
        **{QUALIFY_STAGES[format]: key for format, key in qualify.items()},
        Stage.EXPORT_GGUF: _key(merge, Format.GGUF, examples.heldout_fingerprint),
        Stage.PARITY: parity,
        Stage.JUDGE: judge,
        Stage.REGISTER: _key(parity, recipe.name, limits, metrics, compared),
    }


def _content(path: Path) -> str | None:
    """Return the hash of a file used by metrics, or None if the file cannot be read, which is reported later.

    The registration's stage key depends on the hash, so the version is registered again after a metric's code changes.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
