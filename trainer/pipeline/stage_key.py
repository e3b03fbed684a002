"""What decides the result of each stage of a run, as one short key a stage.

A stage's key is made of what the stage reads: keys of the recipe, data, and the keys of the stages before it whose
files it takes. So a change of `quantize` leaves training, merging and their evaluation done. Answers are
judged, and compared with limits, when the version is registered: with other metrics and limits nothing is asked again.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples
from trainer.recipe.sections import Recipe
from trainer.recipe.stage import Stage

_LIMITS = ("max_gptq_loss", "max_gptq_nll", "max_forgetting", "undecided")
_METRICS = ("metrics", "primary", "json_schema", "metric_seconds")
"""Of the section `evaluate`: what judges the answers at registration, and what the figures are compared with."""

_GENERAL = ("general", "general_limit")
"""Of the same: which questions are asked, of which the content decides."""


StageKeys = Mapping[Stage, str]


def stage_keys(recipe: Recipe, base: Base, examples: Examples) -> StageKeys:
    """The key of each stage.

    Where data lie, how often a training is saved, and whether it draws a curve of held-out loss, decides no result.
    """
    said = recipe.model_dump(mode="json")
    measured = examples.heldout_fingerprint if recipe.stopping.measures else None
    adapter = said["adapter"] | {"type": recipe.adapter_type}  # a method is a name for this and for the next
    said["stopping"].pop("curve")
    learnt = [adapter, recipe.base_quantization, *(said[key] for key in ("chat_template_kwargs", "train", "stopping"))]
    train = _key(base.revision, examples.train_fingerprint, measured, learnt)
    merge = _key(train)
    asked = {key: value for key, value in said["evaluate"].items() if key not in _LIMITS + _METRICS + _GENERAL}
    judged = [examples.heldout_fingerprint, asked, said["qualify"]]
    questions = [examples.questions.fingerprint] if examples.questions else []
    evaluate = _key(merge, judged, *questions)
    quantize = _key(merge, said["quantize"])
    qualify = _key(quantize, judged)
    parity = _key(evaluate, qualify, said["formats"])
    judge = _key(evaluate, said["judge"]["url"], said["judge"]["model"])
    compared = [judge] if recipe.judge.url else []
    limits = [said["evaluate"][key] for key in _LIMITS + _METRICS]
    judging = [_content(path) for path in recipe.evaluate.metric_files]
    return {
        Stage.TRAIN: train,
        Stage.MERGE: merge,
        Stage.EVALUATE: evaluate,
        Stage.QUANTIZE: quantize,
        Stage.QUALIFY: qualify,
        Stage.PARITY: parity,
        Stage.JUDGE: judge,
        Stage.REGISTER: _key(parity, recipe.name, limits, judging, compared),
    }


def _content(path: Path) -> str | None:
    """Of a function that was mended, the key is another one; None for what cannot be read, which is told later."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
