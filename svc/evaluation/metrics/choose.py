"""Which metrics judge a task, and which of them is the primary one: by its references, unless the recipe says."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

from svc.dataset.checks.labels import FEW_ANSWERS, AnswerKind, look_at_answer
from svc.dataset.schema.example import ChatExample
from svc.errors import RecipeError
from svc.evaluation.metrics.accuracy import Accuracy
from svc.evaluation.metrics.chrf import Chrf
from svc.evaluation.metrics.exact_match import ExactMatch
from svc.evaluation.metrics.field_accuracy import FieldAccuracy
from svc.evaluation.metrics.function import FunctionMetric, FunctionSpec
from svc.evaluation.metrics.label import label_of
from svc.evaluation.metrics.length import Length
from svc.evaluation.metrics.macro_f1 import MacroF1
from svc.evaluation.metrics.metric import Answered, Better, Metric
from svc.evaluation.metrics.perplexity import Perplexity
from svc.evaluation.metrics.rouge import Rouge, RougeKind
from svc.evaluation.metrics.schema_valid import SchemaValid, infer_schema, read_schema
from svc.evaluation.metrics.valid_json import ValidJson, read_json
from svc.evaluation.results import ExampleResult

ENTRY_POINTS = "tuneserve.metrics"
"""The group in which an installed package offers metrics: classes of `Metric`, made without arguments."""
_NAME = re.compile("[a-z0-9_]+")
_MOSTLY = 0.95


class Task(StrEnum):
    """What kind of answers is wanted."""

    LABELS = "labels"
    JSON = "json"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class MetricOptions:
    """What a recipe says of metrics.

    Attributes:
        names: of metrics; None: those of the task.
        primary: name of the primary one; None: the task's.
        schema: file of a JSON schema; None: inferred from the references.
        seconds: that a function of the user's may take.
    """

    names: tuple[str, ...] | None = None
    primary: str | None = None
    schema: Path | None = None
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class MetricSet:
    """The metrics of one held-out set.

    Attributes:
        primary: the one that gates, and that monitoring repeats.
        others: shown beside it.
    """

    primary: Metric
    others: tuple[Metric, ...] = ()

    def __iter__(self) -> Iterator[Metric]:
        """All, the primary one first."""
        return iter((self.primary, *self.others))


_GROUPS = {"rouge": ("rouge_l", "rouge_1", "rouge_2")}
_TASKS = {
    Task.LABELS: ("accuracy", "macro_f1", "exact_match"),
    Task.JSON: ("field_accuracy", "schema_valid", "valid_json", "exact_match"),
    Task.TEXT: ("rouge_l", "rouge_1", "rouge_2", "chrf", "exact_match"),
}
_ALWAYS = ("perplexity", "length")
_OF_JSON = ("field_accuracy", "schema_valid")


def find_task(references: Sequence[ChatExample]) -> Task:
    """What kind of answers the references are.

    Labels are few, as for the data check, or stand in the instruction; JSON are objects or lists.
    """
    looks = [look_at_answer(example) for example in references]
    if all(look.kind & AnswerKind.LABEL for look in looks):
        different = len({label_of(example.answer) for example in references})
        listed = sum(bool(look.kind & AnswerKind.LISTED) for look in looks)
        if different <= min(FEW_ANSWERS, len(looks) // 2) or listed >= _MOSTLY * len(looks):
            return Task.LABELS
    return Task.JSON if all(read_json(example.answer) is not None for example in references) else Task.TEXT


def choose_metrics(examples: Sequence[ChatExample], options: MetricOptions | None = None) -> MetricSet:
    """The metrics that examples are judged by.

    Args:
        examples: with their references, all of the held-out set.

    Raises:
        RecipeError: a name that no metric has, or a metric that cannot judge these references.
    """
    options = options or MetricOptions()
    of_task = _of_task(examples)
    names = [one for name in options.names or of_task for one in _GROUPS.get(name, (name,))]
    known = _known(examples, options)
    metrics = {metric.name: metric for metric in (_make(name, known, examples, options) for name in names)}
    if options.primary:
        (name, *_) = _GROUPS.get(options.primary, (options.primary,))
        chosen = _make(name, known, examples, options)
        metrics.setdefault(chosen.name, chosen)
    else:
        judging = [metric for metric in metrics.values() if metric.better is not Better.NEITHER]
        chosen = metrics.get(of_task[0]) or next(iter(judging or metrics.values()))
    if chosen.better is Better.NEITHER:
        raise RecipeError(
            f"the metric {chosen.name} cannot be the primary one: by it nothing is better or worse",
            expected=f"one of {', '.join(name for name in known if name != Length.name)}",
            todo=_SEE,
        )
    return MetricSet(chosen, tuple(metric for name, metric in metrics.items() if name != chosen.name))


def named_metric(name: str) -> Metric:
    """A metric that needs nothing but its name.

    Raises:
        RecipeError: no metric has it, or it cannot be loaded.
    """
    options = MetricOptions()
    return _make(name, _known((), options), (), options)


def try_on_references(metrics: MetricSet, examples: Sequence[ChatExample]) -> None:
    """Lets each metric judge the references as if they were answers: a fault shows before an hour of training.

    Raises:
        SvcError: a metric cannot judge them.
    """
    results = [
        ExampleResult(
            answer=example.answer, tokens=1, limit=1, finish_reason="stop", logprob=0.0, nll=0.0, scored=1, hit=True
        )
        for example in examples
    ]
    for metric in metrics:
        metric.score(Answered(examples, results))


def _of_task(examples: Sequence[ChatExample]) -> tuple[str, ...]:
    task = find_task(examples)
    names = _TASKS[task]
    if task is Task.LABELS and all(read_json(example.answer) is not None for example in examples):
        names += (ValidJson.name,)
    if task is Task.TEXT and not _mostly_latin(examples):  # ROUGE sees no words in them
        names = ("chrf", "exact_match")
    return names + _ALWAYS


def _mostly_latin(examples: Sequence[ChatExample]) -> bool:
    letters = [letter for example in examples for letter in example.answer if letter.isalpha()]
    return sum(letter.isascii() for letter in letters) * 2 >= len(letters)


def _known(examples: Sequence[ChatExample], options: MetricOptions) -> dict[str, Callable[[], Metric]]:
    """How each metric that has a name of its own is made."""
    makers: dict[str, Callable[[], Metric]] = {
        one.name: one for one in (ExactMatch, Accuracy, MacroF1, FieldAccuracy, ValidJson)
    }
    makers[SchemaValid.name] = partial(_schema_valid, examples, options.schema)
    makers |= {kind.value[1]: partial(Rouge, kind) for kind in RougeKind}
    makers |= {one.name: one for one in (Chrf, Perplexity, Length)}
    return makers | {point.name: partial(_load, point.name) for point in entry_points(group=ENTRY_POINTS)}


def _make(
    name: str,
    known: dict[str, Callable[[], Metric]],
    examples: Sequence[ChatExample],
    options: MetricOptions,
) -> Metric:
    if spec := FunctionSpec.parse(name):
        return FunctionMetric(spec, options.seconds)
    if name not in known:
        named = ", ".join([*known, *_GROUPS])
        raise RecipeError(
            f"there is no metric {name!r}", expected=f"{named}, or a function as ./FILE.py:FUNCTION", todo=_SEE
        )
    if name in _OF_JSON:
        _require_json(name, examples)
    return known[name]()


_SEE = "correct evaluate.metrics or evaluate.primary; see docs/evaluation.md"


def _require_json(name: str, examples: Sequence[ChatExample]) -> None:
    for place, example in enumerate(examples):
        if read_json(example.answer) is None:
            raise RecipeError(
                f"the metric {name} compares JSON, and the reference of held-out example {place} is none: "
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
                f"{path} does not accept the reference of held-out example {place}: {example.answer!r:.80}",
                todo="correct the schema or the example",
            )
    return metric


def _load(name: str) -> Metric:
    """The metric of an entry point."""
    (point, *_) = entry_points(group=ENTRY_POINTS, name=name)
    try:
        metric = point.load()()
    except Exception as error:
        raise RecipeError(
            f"the metric {name} cannot be loaded from {point.value}: {error!r}", todo="mend the package, or remove it"
        ) from error
    if not isinstance(metric, Metric) or metric.name != name or not _NAME.fullmatch(name):
        raise RecipeError(
            f"the metric {name} of {point.value} is {metric!r:.80}",
            expected=f"a {Metric.__module__}.Metric whose name is {name}, of a to z, digits and _",
        )
    return metric
