"""Tests that metrics follow from the task unless the recipe selects other metrics."""

import json
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from svc.dataset.schema.example import ChatExample, parse_example
from svc.errors import RecipeError
from svc.evaluation.metrics import choose
from svc.evaluation.metrics.choose import MetricOptions, Task, choose_metrics, find_task, try_on_references
from svc.evaluation.metrics.metric import Answered  # noqa: F401 - what a wrong entry point names
from svc.evaluation.metrics.text import ExactMatch
from tests.svc.chats import chat, turn

LABELS = [chat(f"q {place}", ("net", "doc")[place % 2]) for place in range(10)]
JSON_LABELS = [chat(f"q {place}", json.dumps({"section": ("net", "doc")[place % 2]})) for place in range(10)]
OBJECTS = [chat(f"q {place}", json.dumps({"name": f"n {place}", "size": place})) for place in range(10)]
TEXTS = [chat(f"q {place}", f"a sentence of its own, number {place}") for place in range(10)]
JAPANESE = [chat(f"q {place}", f"これは文 {place} です") for place in range(10)]

CALLING = parse_example(
    {
        "messages": [turn("user", "Rain?"), {"role": "assistant", "tool_calls": [{"function": {"name": "rain"}}]}],
        "tools": [{"name": "rain"}],
    }
)


def test_tool_call_metrics_are_added_to_text_metrics_when_few_references_call_tools() -> None:
    chosen = names([*TEXTS, CALLING])
    assert chosen[0] == "rouge_l"
    assert {"call_accuracy", "tool_accuracy"} <= set(chosen)
    assert names([CALLING, TEXTS[0]])[0] == "call_accuracy"
    assert names([*JAPANESE, CALLING])[:4] == ["chrf", "exact_match", "call_accuracy", "tool_accuracy"]


class Own(ExactMatch):
    """A metric provided by a package."""

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
        ([CALLING, LABELS[0]], Task.CALLS),
        ([*LABELS, CALLING], Task.TEXT),
    ],
)
def test_evaluation_task_is_detected_from_the_references(examples: list[ChatExample], task: Task) -> None:
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
def test_primary_metric_comes_first_for_each_task(examples: list[ChatExample], expected: list[str]) -> None:
    assert names(examples) == [*expected, "perplexity", "length"]


def test_recipe_selects_the_evaluation_metrics() -> None:
    assert names(TEXTS, MetricOptions(("rouge", "length"))) == ["rouge_l", "rouge_1", "rouge_2", "length"]


def test_default_primary_metric_stays_primary_if_it_is_among_the_selected_metrics() -> None:
    assert names(LABELS, MetricOptions(("exact_match", "accuracy")))[0] == "accuracy"


def test_first_selected_metric_that_ranks_models_is_primary_if_the_default_is_not_selected() -> None:
    assert names(TEXTS, MetricOptions(("length", "chrf", "exact_match"))) == ["chrf", "length", "exact_match"]


@pytest.mark.parametrize("primary", ["chrf", "perplexity", "macro_f1", "exact_match"])
def test_recipe_selects_the_primary_metric(primary: str) -> None:
    chosen = names(TEXTS, MetricOptions(primary=primary))
    assert chosen[0] == primary
    assert len(chosen) == len(set(chosen))


@pytest.mark.parametrize("options", [MetricOptions(("rogue",)), MetricOptions(primary="rogue")])
def test_unknown_metric_error_lists_known_metrics(options: MetricOptions) -> None:
    with pytest.raises(RecipeError, match="'rogue'") as caught:
        choose_metrics(TEXTS, options)
    assert {"rouge_l", "rouge", "chrf"} <= set(caught.value.expected.replace(",", "").split())


@pytest.mark.parametrize("options", [MetricOptions(("length",)), MetricOptions(primary="length")])
def test_metric_that_does_not_rank_models_cannot_be_primary(options: MetricOptions) -> None:
    with pytest.raises(RecipeError, match="length cannot be the primary metric"):
        choose_metrics(TEXTS, options)


@pytest.mark.parametrize("name", ["field_accuracy", "schema_valid"])
def test_json_metric_rejects_non_json_references(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} compares JSON, but the reference answer of held-out example 1"):
        choose_metrics([OBJECTS[0], TEXTS[0]], MetricOptions((name,)))


def test_json_schema_in_the_recipe_must_accept_all_references(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"properties": {"size": {"maximum": 5}}}', "utf-8")
    with pytest.raises(RecipeError, match="the reference answer of held-out example 6 does not match the schema"):
        choose_metrics(OBJECTS, MetricOptions(schema=path))


def offer(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    offered = EntryPoints([EntryPoint("own", value, choose.ENTRY_POINTS)])
    monkeypatch.setattr(choose, "entry_points", lambda **chosen: offered.select(**chosen))


def test_installed_package_can_provide_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, f"{__name__}:Own")
    assert names(TEXTS, MetricOptions(("own",))) == ["own"]


@pytest.mark.parametrize(
    ("value", "wrong"), [("no_such_module:Own", "cannot be loaded"), (f"{__name__}:Answered", "cannot be loaded")]
)
def test_error_for_an_entry_point_without_a_metric_names_the_entry_point(
    monkeypatch: pytest.MonkeyPatch, value: str, wrong: str
) -> None:
    offer(monkeypatch, value)
    with pytest.raises(RecipeError, match=wrong) as caught:
        choose_metrics(TEXTS, MetricOptions(("own",)))
    assert value in caught.value.wrong


def test_broken_metric_is_detected_before_evaluation_by_scoring_the_references(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(answers, references):\n    return 1 / 0\n", "utf-8")
    metrics = choose_metrics(TEXTS, MetricOptions((f"{path}:score",)))
    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        try_on_references(metrics, TEXTS)


def test_all_metrics_accept_references_as_good_answers() -> None:
    for examples in (LABELS, JSON_LABELS, OBJECTS, TEXTS, JAPANESE):
        try_on_references(choose_metrics(examples), examples)
