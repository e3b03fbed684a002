"""Tests that a version is evaluated again with its own metric, using only its own files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svc.evaluation.metrics.choose import MetricOptions, choose_metrics
from svc.evaluation.metrics.metric import Answered, Metric
from svc.registry.files import record_files
from svc.registry.manifest import FormatRecord
from svc.registry.primary_metric import watched_metric, write_primary_metric
from svc.registry.registry import Registry
from svc.version import Format, Target, VersionId
from tests.svc.evaluation.answered import answered
from tests.svc.registry.manifests import make_manifest, report

OBJECTS = answered([('{"size": 1}', '{"size": 2}'), ('{"size": "1"}', '{"size": 1}')])
Keep = Callable[..., Target]


@pytest.fixture
def keep(tmp_path: Path, registry: Registry, run: str, name: str, content: dict[str, Path]) -> Keep:
    """Return a function that registers a version evaluated with a metric."""

    def keep(metric: Metric | None, primary: str, **recipe: Any) -> Target:
        reference = tmp_path / "kept"
        reference.mkdir()
        if metric:
            write_primary_metric(reference, metric)

        def manifest(version: VersionId, folder: Path) -> Any:
            files = record_files(folder, folder / Format.MERGED)
            judged = report().model_copy(update={"primary": primary})
            formats = {Format.MERGED: FormatRecord(files=files, evaluation=judged)}
            records = record_files(folder, folder / "reference")
            return make_manifest(version, folder, formats=formats, reference=records, recipe={"evaluate": recipe})

        return Target(registry.publish(name, run, content | {"reference": reference}, manifest).id, Format.MERGED)

    return keep


@pytest.mark.parametrize(
    ("primary", "watched"),
    [
        ("exact_match", "exact_match"),
        ("rouge_l", "rouge_l"),
        ("accuracy", "accuracy"),
        ("macro_f1", "accuracy"),
        ("perplexity", "exact_match"),
        ("field_accuracy", "field_accuracy"),
    ],
)
def test_monitored_metric_is_the_primary_metric_or_a_per_example_substitute(
    registry: Registry, keep: Keep, primary: str, watched: str
) -> None:
    assert watched_metric(registry, keep(None, primary), run_functions=False).name == watched


def test_json_schema_used_in_evaluation_is_stored_with_the_version(registry: Registry, keep: Keep) -> None:
    metric = choose_metrics(OBJECTS.examples, MetricOptions(primary="schema_valid"))[0]
    again = watched_metric(registry, keep(metric, "schema_valid"), run_functions=False)
    assert again.score(OBJECTS) == metric.score(OBJECTS) == [1.0, 0.0]


def test_metric_function_stored_with_a_version_works_after_its_source_file_is_deleted(
    registry: Registry, keep: Keep, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(answers, references):\n    return [len(answer) for answer in answers]\n", "utf-8")
    metric = choose_metrics(OBJECTS.examples, MetricOptions((f"{path}:score",)))[0]
    target = keep(metric, metric.name, metrics=["rouge", f"{path}:score"], metric_seconds=30.0)
    path.unlink()
    again = watched_metric(registry, target, run_functions=True)
    assert again.name == "mine_score"
    assert again.score(Answered(OBJECTS.examples, OBJECTS.results)) == [11.0, 13.0]


def test_stored_metric_function_runs_only_with_operator_permission(
    registry: Registry, keep: Keep, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(answers, references):\n    return [1.0 for _ in answers]\n", "utf-8")
    metric = choose_metrics(OBJECTS.examples, MetricOptions((f"{path}:score",)))[0]
    target = keep(metric, metric.name, metrics=[f"{path}:score"])
    assert watched_metric(registry, target, run_functions=False).name == "exact_match"
