"""Selects a task's metrics, including the primary metric. Unless the recipe names them, the choice depends on the
references."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from svc.dataset.checks.labels import FEW_ANSWERS, AnswerKind, look_at_answer
from svc.dataset.schema.example import ChatExample, any_call_tools
from svc.dataset.schema.tool_calls import calls_in
from svc.errors import RecipeError
from svc.evaluation.metrics.function import FunctionMetric, FunctionSpec
from svc.evaluation.metrics.json_answers import (
    FieldAccuracy,
    SchemaValid,
    ValidJson,
    infer_schema,
    read_json,
    read_schema,
)
from svc.evaluation.metrics.labels import Accuracy, MacroF1, label_of
from svc.evaluation.metrics.metric import Answered, AnswerMetric, Better, Metric
from svc.evaluation.metrics.text import Chrf, ExactMatch, Rouge
from svc.evaluation.metrics.tokens import Length, Perplexity
from svc.evaluation.results import ExampleResult

ENTRY_POINTS = "tuneserve.metrics"
"""Entry-point group for packages that provide `Metric` classes. Their constructors must not require arguments."""
_NAME = re.compile("[a-z0-9_]+")
_MOSTLY = 0.95
_SEE = "correct evaluate.metrics or evaluate.primary; see docs/evaluation.md"


class CallAccuracy(AnswerMetric):
    """Share of answers that make the same tool calls as the reference, in any order.

    Two calls are the same if they name the same tool and pass the same arguments. Arguments are compared as JSON, so
    the order of keys does not matter, and 1 equals 1.0. If the reference does not call any tool, every answer without
    calls is right, whatever its text.
    """

    name = "call_accuracy"
    title = "right calls"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(_calls(answer) == _calls(reference))


class ToolAccuracy(AnswerMetric):
    """Share of answers that call the same tools as the reference, in any order and with any arguments."""

    name = "tool_accuracy"
    title = "right tools"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(_tools(answer) == _tools(reference))


def _calls(text: str) -> Counter[tuple[str, str]]:
    return Counter((name, _comparable(arguments)) for name, arguments in calls_in(text))


def _comparable(arguments: Any) -> str:
    numbers = json.loads(json.dumps(arguments), parse_float=_shortest)
    return json.dumps(numbers, sort_keys=True)


def _shortest(number: str) -> int | float:
    value = float(number)
    return int(value) if value.is_integer() else value


def _tools(text: str) -> Counter[str]:
    return Counter(name for name, _ in calls_in(text))


class Task(StrEnum):
    """The kind of answer that a task requires."""

    CALLS = "calls"
    LABELS = "labels"
    JSON = "json"
    TEXT = "text"
    DOCUMENTS = "documents"


@dataclass(frozen=True, slots=True)
class MetricOptions:
    """The metrics that a recipe selects, and their options.

    Attributes:
        names: names of the metrics, or None for the task's default metrics.
        primary: name of the primary metric, or None for the task's default.
        schema: file with a JSON schema, or None to infer the schema from the references.
        seconds: time limit for a call of the user's metric function, in seconds.
    """

    names: tuple[str, ...] | None = None
    primary: str | None = None
    schema: Path | None = None
    seconds: float = 60.0


_GROUPS = {"rouge": ("rouge_l", "rouge_1", "rouge_2")}
_PLAIN = (
    ExactMatch(),
    Accuracy(),
    MacroF1(),
    FieldAccuracy(),
    ValidJson(),
    CallAccuracy(),
    ToolAccuracy(),
    *map(Rouge, "12L"),
    Chrf(),
    Perplexity(),
    Length(),
)
"""Metrics that can be created without options."""
_TASKS = {
    Task.CALLS: ("call_accuracy", "tool_accuracy", "exact_match"),
    Task.LABELS: ("accuracy", "macro_f1", "exact_match"),
    Task.JSON: ("field_accuracy", "schema_valid", "valid_json", "exact_match"),
    Task.TEXT: ("rouge_l", "rouge_1", "rouge_2", "chrf", "exact_match"),
    Task.DOCUMENTS: ("perplexity",),
}
_ALWAYS = ("perplexity", "length")


def find_task(references: Sequence[ChatExample]) -> Task:
    """Infer the kind of task from the references.

    The kind is `calls` if at least half of the references call tools. It is `labels` if every reference could be a
    label, and either there are only a few distinct labels (the data check uses the same limit) or the instruction lists
    nearly all of them. It is `json` if all references are objects or lists, and `text` otherwise. It is `documents` if
    the examples have no answers.
    """
    if references and all(example.is_document for example in references):
        return Task.DOCUMENTS
    calls = sum(example.calls_tools for example in references)
    if calls and calls * 2 >= len(references):
        return Task.CALLS
    looks = [look_at_answer(example) for example in references]
    if all(look.kind & AnswerKind.LABEL for look in looks):
        different = len({label_of(example.answer) for example in references})
        listed = sum(bool(look.kind & AnswerKind.LISTED) for look in looks)
        if different <= min(FEW_ANSWERS, len(looks) // 2) or listed >= _MOSTLY * len(looks):
            return Task.LABELS
    return Task.JSON if all(read_json(example.answer) is not None for example in references) else Task.TEXT


def choose_metrics(examples: Sequence[ChatExample], options: MetricOptions | None = None) -> tuple[Metric, ...]:
    """Return the metrics for evaluating the examples, primary metric first.

    Args:
        examples: the whole held-out set, including references.

    Raises:
        RecipeError: a metric is unknown, or cannot evaluate these references.
    """
    options = options or MetricOptions()
    of_task = _of_task(examples)
    names = [member for name in options.names or of_task for member in _GROUPS.get(name, (name,))]
    metrics = [_make(name, examples, options) for name in names]
    if options.primary:
        (name, *_) = _GROUPS.get(options.primary, (options.primary,))
        primary = _make(name, examples, options)
    else:
        first = [metric for metric in metrics if metric.name == of_task[0]]
        judging = [metric for metric in metrics if metric.better is not Better.NEITHER]
        primary = (first or judging or metrics)[0]
    if primary.better is Better.NEITHER:
        raise RecipeError(
            f"metric {primary.name} cannot be the primary metric: it does not rank models",
            expected="a metric that ranks models, either by higher or by lower values",
            todo=_SEE,
        )
    return tuple({metric.name: metric for metric in (primary, *metrics)}.values())


def named_metric(name: str) -> Metric:
    """Return the metric with the given name, using default options.

    Raises:
        RecipeError: the metric is unknown or cannot be loaded.
    """
    return _make(name, (), MetricOptions())


def try_on_references(metrics: Sequence[Metric], examples: Sequence[ChatExample]) -> None:
    """Evaluate the references as if they were answers, so that faulty metrics are detected before training.

    Raises:
        SvcError: a metric cannot evaluate the references.
    """
    results = [
        ExampleResult(
            answer=example.answer, tokens=1, limit=1, finish_reason="stop", logprob=0.0, nll=0.0, scored=1, hit=True
        )
        for example in examples
    ]
    for metric in metrics:
        metric.checked_score(Answered(examples, results))


def _of_task(examples: Sequence[ChatExample]) -> tuple[str, ...]:
    task = find_task(examples)
    if task is Task.DOCUMENTS:
        return _TASKS[task]
    text = _TASKS[Task.TEXT] if _mostly_latin(examples) else ("chrf", "exact_match")  # ROUGE knows only Latin letters
    names = text if task is Task.TEXT else _TASKS[task]
    if task is Task.LABELS and all(read_json(example.answer) is not None for example in examples):
        names += (ValidJson.name,)
    if any_call_tools(examples):
        names = tuple(dict.fromkeys((*names, *_TASKS[Task.CALLS], *text)))
    return names + _ALWAYS


def _mostly_latin(examples: Sequence[ChatExample]) -> bool:
    letters = [letter for example in examples for letter in example.messages[-1].content if letter.isalpha()]
    return sum(letter.isascii() for letter in letters) * 2 >= len(letters)


def _make(name: str, examples: Sequence[ChatExample], options: MetricOptions) -> Metric:
    if spec := FunctionSpec.parse(name):
        return FunctionMetric(spec, options.seconds)
    if name in (FieldAccuracy.name, SchemaValid.name):
        _require_json(name, examples)
    if name == SchemaValid.name:
        return _schema_valid(examples, options.schema)
    if plain := next((metric for metric in _PLAIN if metric.name == name), None):
        return plain
    offered = entry_points(group=ENTRY_POINTS)
    if name in offered.names:
        return _load(offered[name])
    known = [*(metric.name for metric in _PLAIN), SchemaValid.name, *sorted(offered.names), *_GROUPS]
    raise RecipeError(
        f"unknown metric {name!r}", expected=f"{', '.join(known)}, or a function given as ./FILE.py:FUNCTION", todo=_SEE
    )


def _require_json(name: str, examples: Sequence[ChatExample]) -> None:
    for place, example in enumerate(examples):
        if read_json(example.answer) is None:
            raise RecipeError(
                f"metric {name} compares JSON, but the reference answer of held-out example {place} is not JSON: "
                f"{example.answer!r:.80}",
                todo=_SEE,
            )


def _schema_valid(examples: Sequence[ChatExample], path: Path | None) -> SchemaValid:
    if path is None:
        return SchemaValid(infer_schema([read_json(example.answer) for example in examples]))
    metric = SchemaValid(read_schema(path))
    for place, example in enumerate(examples):
        if not metric.accepts(example.answer):
            raise RecipeError(
                f"the reference answer of held-out example {place} does not match the schema {path}: "
                f"{example.answer!r:.80}",
                todo="correct the schema or the example",
            )
    return metric


def _load(point: EntryPoint) -> Metric:
    try:
        metric = point.load()()
    except Exception as error:
        raise RecipeError(
            f"metric {point.name} cannot be loaded from {point.value}: {error!r}",
            todo="fix or uninstall the package",
        ) from error
    if not isinstance(metric, Metric) or metric.name != point.name or not _NAME.fullmatch(point.name):
        raise RecipeError(
            f"the entry point {point.value} of metric {point.name} does not provide a valid metric: {metric!r:.80}",
            expected=f"a {Metric.__module__}.Metric named {point.name}; names may contain only a-z, 0-9 and _",
        )
    return metric
