"""One comparison from its words to its result: who, what, asked, compared. What leaves this machine is told before."""

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
from svc.settings import Settings
from svc.terminal import console
from svc.version import Format
from trainer.comparison.ask import Answers, Interview, LaunchModel, Tokenize
from trainer.comparison.model import LocalModel, Model, asked_alike, find_model
from trainer.comparison.questions import Questions, Wanted, choose_questions, count_learnt
from trainer.data.chat_template import tokenize_as_trained
from trainer.pipeline.evaluation_engine import evaluation_engine

FOLDER = "compare"
"""In the home: the log of the engine, and a lock."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Two models, what they were asked, what they answered, and what follows."""

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
    """Compares B with A.

    Args:
        registry, capabilities: default: those of the settings, and of this machine.
        launch: makes a new, unstarted engine; default: a vLLM process on this machine.
        tokenize, transport: see `Interview`.

    Raises:
        BusyError: another comparison runs in this home.
        SvcError: a model, the data or a metric cannot be had, or an engine failed.
    """
    registry = registry or Registry.of(settings)
    format = Format(wanted.format) if wanted.format else None
    find = partial(find_model, registry=registry, settings=settings, format=format, key=wanted.key)
    one, other = find(wanted.first), find(wanted.second)
    models = [asked_alike(one, other), asked_alike(other, one)]
    questions = choose_questions(models, registry, wanted, settings.base_cache)
    metrics = choose_metrics(questions.whole, questions.options)
    try_on_references(metrics, questions.examples)
    _tell(models, questions, registry)
    folder = settings.home / FOLDER
    with hold_lock(folder / "lock", "svc compare in this home"):
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
    first, second = (found.results for found in answers)
    comparison = compare(questions.examples, first, second, metrics, no_tokens=_why_no_tokens(models))
    judge = None
    if wanted.judge:
        said = ([result.answer for result in results] for results in (first, second))
        judge = asyncio.run(judge_answers(wanted.judge, questions.examples, *said, title="judging B beside A"))
    return Compared(models, questions, answers, comparison, judge)


def _tell(models: Sequence[Model], questions: Questions, registry: Registry) -> None:
    """Say what leaves the machine, and whose figures are too good."""
    count = len(questions.examples)
    for model in models:
        said = ""
        if isinstance(model, Endpoint):
            said = f"the prompts of {count} examples are sent to {model.url}"
        elif model.manifest and (learnt := count_learnt(model.manifest, questions.examples, registry)):
            said = f"{model} was trained on {learnt} of {count} prompts: its figures are too good on them"
        if said:
            console.print(said, style="yellow", markup=False, soft_wrap=True)


def _why_no_tokens(models: Sequence[Model]) -> str:
    """Why nothing that counts in tokens can be compared; empty where it can."""
    if any(isinstance(model, Endpoint) for model in models):
        return "an endpoint elsewhere gives no log-probabilities of a prompt, and counts in tokens of its own"
    folders = {model.folder for model in models if isinstance(model, LocalModel)}
    if len({tokenizer_fingerprint(folder) for folder in folders}) > 1:
        return "the two have different tokenizers"
    return ""
