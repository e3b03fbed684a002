"""One comparison from its words to its result: who, what, asked, compared. What leaves this machine is told before."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from svc.chat_template import TemplateKwargs
from svc.engine.capabilities import Capabilities, read_capabilities
from svc.engine.engine import Engine
from svc.evaluation.comparison import Comparison, compare
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.judge import JudgeReport, Pair, judge_pairs
from svc.evaluation.metrics.choose import MetricOptions, choose_metrics, try_on_references
from svc.evaluation.results import ExampleResult
from svc.lock import hold_lock
from svc.registry.fingerprint import tokenizer_fingerprint
from svc.registry.registry import Registry
from svc.settings import Settings
from svc.terminal import console, counting
from svc.version import Format
from trainer.comparison.ask import Answers, Interview, LaunchModel, Tokenize
from trainer.comparison.model import LocalModel, Model, asked_alike, find_model
from trainer.comparison.questions import Questions, choose_questions, count_learnt
from trainer.data.chat_template import tokenize_as_trained
from trainer.pipeline.evaluation_engine import evaluation_engine

FOLDER = "compare"
"""In the home: the log of the engine, and a lock."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says; its options have the same names.

    Attributes:
        key: for endpoints among the models.
        judge: compares the answers too; None for none.
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
class Compared:
    """Two models, what they were asked, what they answered, and what follows."""

    models: Sequence[Model]
    questions: Questions
    answers: Sequence[Answers]
    comparison: Comparison
    judge: JudgeReport | None = None


def compare_models(
    settings: Settings,
    wanted: Wanted,
    *,
    registry: Registry | None = None,
    capabilities: Capabilities | None = None,
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
    models = _find_models(settings, wanted, registry)
    questions = choose_questions(
        models,
        registry,
        data=wanted.data,
        cache=settings.base_cache,
        limit=wanted.limit,
        max_tokens=wanted.max_tokens,
        options=MetricOptions(tuple(wanted.metrics) or None, wanted.primary),
    )
    metrics = choose_metrics(questions.whole, questions.options)
    try_on_references(metrics, questions.examples)
    _tell(models, questions, registry)
    folder = settings.home / FOLDER
    with hold_lock(folder / "lock", "svc compare in this home"):
        able = capabilities or read_capabilities(settings.home)
        interview = Interview(
            settings,
            able,
            registry,
            launch or partial(_launch, settings, able, folder),
            questions.examples,
            questions.max_tokens,
            wanted.fresh,
            tokenize,
            transport,
        )
        answers = asyncio.run(interview.ask(models))
    first, second = (one.results for one in answers)
    comparison = compare(questions.examples, first, second, metrics, no_tokens=_why_no_tokens(models))
    judge = _ask_judge(wanted.judge, questions, first, second) if wanted.judge else None
    return Compared(models, questions, answers, comparison, judge)


def _find_models(settings: Settings, wanted: Wanted, registry: Registry) -> list[Model]:
    format = Format(wanted.format) if wanted.format else None
    found = [
        find_model(text, registry, settings, format=format, key=wanted.key) for text in (wanted.first, wanted.second)
    ]
    others = reversed(found)
    return [
        asked_alike(model, other) if isinstance(model, LocalModel) else model
        for model, other in zip(found, others, strict=True)
    ]


def _ask_judge(
    judge: Endpoint, questions: Questions, first: Sequence[ExampleResult], second: Sequence[ExampleResult]
) -> JudgeReport:
    answers = zip(questions.examples, first, second, strict=True)
    pairs = [Pair(example, one.answer, other.answer) for example, one, other in answers]
    with counting("judging B beside A", len(pairs)) as advance:
        return asyncio.run(judge_pairs(pairs, judge, on_done=advance))


def _launch(
    settings: Settings, capabilities: Capabilities, folder: Path, model: Path, template_kwargs: TemplateKwargs
) -> Engine:
    return evaluation_engine(
        model,
        settings=settings,
        capabilities=capabilities,
        run=folder,
        name="compared",
        template_kwargs=template_kwargs,
    )


def _tell(models: Sequence[Model], questions: Questions, registry: Registry) -> None:
    """What leaves the machine, and whose figures are too good."""
    for model in models:
        if isinstance(model, Endpoint):
            console.print(
                f"[yellow]the prompts of {len(questions.examples)} examples are sent to {model.url}[/yellow]",
                soft_wrap=True,
            )
        elif model.manifest:
            learnt = count_learnt(model.manifest, questions.examples, registry)
            if learnt:
                console.print(
                    f"[yellow]{model.name} was trained on {learnt} of {len(questions.examples)} prompts: its figures "
                    "are too good on them[/yellow]",
                    soft_wrap=True,
                )


def _why_no_tokens(models: Sequence[Model]) -> str:
    """Why nothing that counts in tokens can be compared; empty where it can."""
    if any(isinstance(model, Endpoint) for model in models):
        return "an endpoint elsewhere gives no log-probabilities of a prompt, and counts in tokens of its own"
    folders = {model.folder for model in models if isinstance(model, LocalModel)}
    if len({tokenizer_fingerprint(folder) for folder in folders}) > 1:
        return "the two have different tokenizers"
    return ""
