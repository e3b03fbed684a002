"""Metrics follow from the task, and from the recipe where it says other ones."""

import json
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from svc.dataset.schema.example import ChatExample
from svc.errors import RecipeError
from svc.evaluation.metrics import choose
from svc.evaluation.metrics.choose import MetricOptions, Task, choose_metrics, find_task, try_on_references
from svc.evaluation.metrics.metric import Answered  # noqa: F401 - what a wrong entry point names
from svc.evaluation.metrics.text import ExactMatch
from tests.svc.chats import chat

LABELS = [chat(f"q {place}", ("net", "doc")[place % 2]) for place in range(10)]
JSON_LABELS = [chat(f"q {place}", json.dumps({"section": ("net", "doc")[place % 2]})) for place in range(10)]
OBJECTS = [chat(f"q {place}", json.dumps({"name": f"n {place}", "size": place})) for place in range(10)]
TEXTS = [chat(f"q {place}", f"a sentence of its own, number {place}") for place in range(10)]
JAPANESE = [chat(f"q {place}", f"これは文 {place} です") for place in range(10)]


class Own(ExactMatch):
    """What a package offers."""

    name = "own"
    title = "own"


def names(examples: list[ChatExample], options: MetricOptions | None = None) -> list[str]:
    return [metric.name for metric in choose_metrics(examples, options)]


@pytest.mark.parametrize(
    ("examples", "task"),
    [
        (LABELS, Task.LABELS),
        (JSON_LABELS, Task.LABELS),
        (OBJECTS, Task.JSON),
        (TEXTS, Task.TEXT),
        ([chat(f"one of: a{place}, b", f"a{place}") for place in range(4)], Task.LABELS),
        ([*LABELS, *OBJECTS], Task.TEXT),
    ],
)
def test_the_task_is_read_off_the_references(examples: list[ChatExample], task: Task) -> None:
    assert find_task(examples) is task


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        (LABELS, ["accuracy", "macro_f1", "exact_match"]),
        (JSON_LABELS, ["accuracy", "macro_f1", "exact_match", "valid_json"]),
        (OBJECTS, ["field_accuracy", "schema_valid", "valid_json", "exact_match"]),
        (TEXTS, ["rouge_l", "rouge_1", "rouge_2", "chrf", "exact_match"]),
        (JAPANESE, ["chrf", "exact_match"]),
    ],
)
def test_each_task_has_its_metrics_the_primary_one_first(examples: list[ChatExample], expected: list[str]) -> None:
    assert names(examples) == [*expected, "perplexity", "length"]


def test_a_recipe_says_which_metrics_there_are() -> None:
    assert names(TEXTS, MetricOptions(("rouge", "length"))) == ["rouge_l", "rouge_1", "rouge_2", "length"]


def test_the_tasks_own_primary_metric_stays_so_among_those_that_are_named() -> None:
    assert names(LABELS, MetricOptions(("exact_match", "accuracy")))[0] == "accuracy"


def test_without_it_the_first_that_judges_is_the_primary_one() -> None:
    assert names(TEXTS, MetricOptions(("length", "chrf", "exact_match"))) == ["chrf", "length", "exact_match"]


@pytest.mark.parametrize("primary", ["chrf", "perplexity", "macro_f1", "exact_match"])
def test_a_recipe_says_which_is_the_primary_one(primary: str) -> None:
    chosen = names(TEXTS, MetricOptions(primary=primary))
    assert chosen[0] == primary
    assert len(chosen) == len(set(chosen))


@pytest.mark.parametrize("options", [MetricOptions(("rogue",)), MetricOptions(primary="rogue")])
def test_a_metric_that_does_not_exist_is_told_with_those_that_do(options: MetricOptions) -> None:
    with pytest.raises(RecipeError, match="'rogue'") as caught:
        choose_metrics(TEXTS, options)
    assert {"rouge_l", "rouge", "chrf"} <= set(caught.value.expected.replace(",", "").split())


@pytest.mark.parametrize("options", [MetricOptions(("length",)), MetricOptions(primary="length")])
def test_what_judges_nothing_is_no_primary_metric(options: MetricOptions) -> None:
    with pytest.raises(RecipeError, match="length cannot be the primary one"):
        choose_metrics(TEXTS, options)


@pytest.mark.parametrize("name", ["field_accuracy", "schema_valid"])
def test_what_compares_json_refuses_references_that_are_none(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} compares JSON, but the reference of held-out example 1"):
        choose_metrics([OBJECTS[0], TEXTS[0]], MetricOptions((name,)))


def test_a_schema_of_the_recipe_must_accept_the_references(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"properties": {"size": {"maximum": 5}}}', "utf-8")
    with pytest.raises(RecipeError, match="does not accept the reference of held-out example 6"):
        choose_metrics(OBJECTS, MetricOptions(schema=path))


def offer(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    offered = EntryPoints([EntryPoint("own", value, choose.ENTRY_POINTS)])
    monkeypatch.setattr(choose, "entry_points", lambda **chosen: offered.select(**chosen))


def test_an_installed_package_offers_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, f"{__name__}:Own")
    assert names(TEXTS, MetricOptions(("own",))) == ["own"]


@pytest.mark.parametrize(
    ("value", "wrong"), [("no_such_module:Own", "cannot be loaded"), (f"{__name__}:Answered", "cannot be loaded")]
)
def test_a_package_that_offers_none_is_named(monkeypatch: pytest.MonkeyPatch, value: str, wrong: str) -> None:
    offer(monkeypatch, value)
    with pytest.raises(RecipeError, match=wrong) as caught:
        choose_metrics(TEXTS, MetricOptions(("own",)))
    assert value in caught.value.wrong


def test_references_judged_as_answers_show_a_fault_early(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(answers, references):\n    return 1 / 0\n", "utf-8")
    metrics = choose_metrics(TEXTS, MetricOptions((f"{path}:score",)))
    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        try_on_references(metrics, TEXTS)


def test_references_are_good_answers() -> None:
    for examples in (LABELS, JSON_LABELS, OBJECTS, TEXTS, JAPANESE):
        try_on_references(choose_metrics(examples), examples)
