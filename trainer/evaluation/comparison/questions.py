"""Chooses the questions and metrics for comparing two models. The questions come from a file, or from the
held-out set that both versions share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from svc.dataset.prompt_hashes import TRAINED_PROMPTS_FILE, hash_prompts, read_prompt_hashes
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.errors import DataError, NotFoundError
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.metrics.choose import MetricOptions
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.version import VersionId
from trainer.evaluation.comparison.model import LocalModel, Model
from trainer.recipe.evaluate import Evaluate


@dataclass(frozen=True, slots=True)
class Wanted:
    """The arguments of `svc compare`, named like its options.

    Attributes:
        key: API key for models that are endpoints.
        judge: endpoint of a judge that also compares the answers, or None for no judge.
    """

    first: str
    second: str
    data: Sequence[str] = ()
    limit: int | None = None
    format: str | None = None
    max_tokens: int | None = None
    metrics: Sequence[str] = ()
    primary: str | None = None
    fresh: bool = False
    key: str | None = field(default=None, repr=False)
    judge: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Questions:
    """The questions of a comparison.

    Attributes:
        origin: source of the examples, for display.
        max_tokens: token limit for every answer; if None, the limit depends on each reference answer.
        options: metrics for the answers.
        whole: all examples of the source, which determine the task kind even if only some of them are sent.
    """

    examples: Sequence[ChatExample]
    origin: str
    max_tokens: int | None
    options: MetricOptions
    whole: Sequence[ChatExample]


def choose_questions(models: Sequence[Model], registry: Registry, wanted: Wanted, cache: Path) -> Questions:
    """Choose the examples of a comparison, with the metrics and token limits for the answers.

    Args:
        wanted: the command's arguments. If they name no data, the held-out set that the versions share is used, limited
            to the examples on which the versions were evaluated. If they also name no metrics, the first
            version's metrics are used.
        cache: folder for Hub datasets.

    Raises:
        DataError: neither model has a held-out set, the versions have different held-out sets, or the data cannot be
            read.
    """
    versions = [model.manifest for model in models if isinstance(model, LocalModel) and model.manifest]
    options = MetricOptions(tuple(wanted.metrics) or None, wanted.primary)
    longest = wanted.max_tokens or (versions[0].max_answer_tokens if versions else None)
    if wanted.data:
        whole = read_examples(wanted.data, cache=cache)
        return Questions(whole[: wanted.limit], ", ".join(wanted.data), longest, options, whole)
    if not versions:
        raise DataError("neither model has a held-out set", todo="provide examples with --data FILE")
    if len({version.data.heldout_fingerprint for version in versions}) > 1:
        raise DataError(
            f"{versions[0].id} and {versions[1].id} have different held-out sets",
            expected="versions that were evaluated on the same examples",
            todo="provide the examples with --data FILE",
        )
    counts = [count for count in (wanted.limit, *(version.judged_examples for version in versions)) if count]
    whole = registry.heldout(versions[0].id)
    if options == MetricOptions():
        options = Evaluate.model_validate(versions[0].recipe.get("evaluate", {})).metric_options
    origin = f"the held-out set of {versions[0].id}"
    return Questions(whole[: min(counts, default=None)], origin, longest, options, whole)


def count_learnt(version: Manifest, examples: Sequence[ChatExample], registry: Registry) -> int:
    """Return the number of examples whose prompts a version, or any version in its chain of bases, was trained on."""
    prompts, learnt = hash_prompts(examples), np.zeros(len(examples), bool)
    continued: Manifest | None = version
    while continued is not None:
        learnt |= np.isin(prompts, read_prompt_hashes(registry.reference(continued.id, TRAINED_PROMPTS_FILE)))
        continued = _base_version(continued, registry)
    return int(learnt.sum())


def _base_version(version: Manifest, registry: Registry) -> Manifest | None:
    try:
        return registry.manifest(VersionId.parse(version.base.origin))
    except NotFoundError:  # the base is not a version, or was removed
        return None
