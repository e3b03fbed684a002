"""Runs a comparison, from the command's arguments to its result. Before the comparison starts, prints which data will
leave this machine.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import httpx

from svc.engine.device import DeviceCapabilities, read_capabilities
from svc.evaluation.comparison import VersionComparison, compare
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.judge import JudgeReport, judge_answers
from svc.evaluation.metrics.choose import choose_metrics, try_on_references
from svc.files.lock import hold_lock
from svc.registry.fingerprint import tokenizer_fingerprint
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.terminal import console
from svc.version import Format
from trainer.data.chat_template import tokenize_as_trained
from trainer.evaluation.comparison.ask import Answers, Interview, Tokenize
from trainer.evaluation.comparison.model import LocalModel, Model, asked_alike, find_model
from trainer.evaluation.comparison.questions import Questions, Wanted, choose_questions, count_learnt
from trainer.evaluation.evaluation_engine import LaunchModel, evaluation_engine

FOLDER = "compare"
"""Folder in $SVC_HOME for the engine's log and a lock file."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A completed comparison: the two models, the questions, their answers and the result."""

    models: Sequence[Model]
    questions: Questions
    answers: Sequence[Answers]
    comparison: VersionComparison
    judge: JudgeReport | None = None


def compare_models(
    settings: Settings,
    wanted: Wanted,
    *,
    registry: Registry | None = None,
    capabilities: DeviceCapabilities | None = None,
    launch: LaunchModel | None = None,
    tokenize: Tokenize = tokenize_as_trained,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Compared:
    """Compare model B with model A.

    Args:
        registry, capabilities: default to the registry in the settings and the capabilities of this machine.
        launch: creates a new, unstarted engine; defaults to a vLLM process on this machine.
        tokenize, transport: see `Interview`.

    Raises:
        BusyError: another comparison is running in this home folder.
        SvcError: a model, the data or a metric is missing or unusable, or an engine failed.
    """
    registry = registry or Registry.of(settings)
    format = Format(wanted.format) if wanted.format else None
    find = partial(find_model, registry=registry, settings=settings, format=format, key=wanted.key)
    first_model, second_model = find(wanted.first), find(wanted.second)
    pairs = (first_model, second_model), (second_model, first_model)
    models = [asked_alike(model, other, settings.base_cache) for model, other in pairs]
    questions = choose_questions(models, registry, wanted, settings.base_cache)
    metrics = choose_metrics(questions.whole, questions.options)
    try_on_references(metrics, questions.examples)
    _warn(models, questions, registry)
    folder = settings.home / FOLDER
    with hold_lock(folder / "lock", "svc compare in this home folder"):
        able = capabilities or read_capabilities(settings.home)
        start = partial(evaluation_engine, settings=settings, capabilities=able, run=folder, name="compared")
        interview = Interview(
            settings,
            able,
            registry,
            launch or start,
            questions.examples,
            questions.max_tokens,
            wanted.fresh,
            tokenize,
            transport,
        )
        answers = asyncio.run(interview.ask(models))
    first, second = (of_model.results for of_model in answers)
    comparison = compare(questions.examples, first, second, metrics, no_tokens=_why_no_tokens(models))
    judge = None
    if wanted.judge:
        texts = ([result.answer for result in results] for results in (first, second))
        judge = asyncio.run(judge_answers(wanted.judge, questions.examples, *texts, title="judging B against A"))
    return Compared(models, questions, answers, comparison, judge)


def _warn(models: Sequence[Model], questions: Questions, registry: Registry) -> None:
    """Warn, for each model, if prompts will be sent to its endpoint, or if it was trained on some of the prompts."""
    count = len(questions.examples)
    for model in models:
        message = ""
        if isinstance(model, Endpoint):
            message = f"the prompts of {count} examples will be sent to {model.url}"
        elif model.manifest and (learnt := count_learnt(model.manifest, questions.examples, registry)):
            message = f"{model} was trained on {learnt} of {count} prompts, so its results are too optimistic"
        if message:
            console.print(message, style="yellow", markup=False, soft_wrap=True)


def _why_no_tokens(models: Sequence[Model]) -> str:
    """Return the reason why token metrics cannot be compared, or an empty string if they can."""
    if any(isinstance(model, Endpoint) for model in models):
        return "a remote endpoint returns no log-probabilities for a prompt, and uses its own tokenizer"
    folders = {model.folder for model in models if isinstance(model, LocalModel)}
    if len({tokenizer_fingerprint(folder) for folder in folders}) > 1:
        return "the two models have different tokenizers"
    return ""
