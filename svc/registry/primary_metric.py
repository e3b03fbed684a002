"""A version's primary metric, stored with the version so that any machine can evaluate it in the same way.

Most metrics are fully identified by their name. A schema or a user-defined function is additionally
stored as a file in the version's reference folder.
"""

import json
import shutil
from pathlib import Path

from svc.evaluation.metrics.choose import named_metric
from svc.evaluation.metrics.function import FunctionMetric, FunctionSpec
from svc.evaluation.metrics.json_answers import SchemaValid, read_schema
from svc.evaluation.metrics.metric import Metric
from svc.evaluation.metrics.text import ExactMatch
from svc.registry.registry import Registry
from svc.version import Target

_SCHEMA = "json_schema.json"
_FUNCTION = "metric-{name}.py"


def write_primary_metric(folder: Path, metric: Metric) -> None:
    """Write the files that a metric needs.

    Args:
        folder: folder that will become a version's `REFERENCE_FOLDER`.
    """
    match metric:
        case SchemaValid():
            (folder / _SCHEMA).write_text(json.dumps(metric.schema, indent=1), "utf-8")
        case FunctionMetric():
            shutil.copyfile(metric.spec.path, folder / _FUNCTION.format(name=metric.name))


def watched_metric(registry: Registry, target: Target, *, run_functions: bool) -> Metric:
    """Return the metric that scores individual held-out examples: the metric that the primary metric names in
    `watched_by`, or else the primary metric itself.

    Args:
        run_functions: whether a metric function stored with the version may run. It is code from the user
            who registered the version. If it may not run, exact match is used instead.

    Raises:
        NotFoundError: the version does not exist, or lacks the format.
        RecipeError: the metric is not installed on this machine.
        IntegrityError: one of the metric's files is missing or was changed.
    """
    report = registry.format(target.version, target.format).evaluation
    name = report.primary if report else ExactMatch.name
    files = {Path(record.path).name for record in registry.manifest(target.version).reference}
    if name == SchemaValid.name and _SCHEMA in files:
        return SchemaValid(read_schema(registry.reference(target.version, _SCHEMA)))
    function = _FUNCTION.format(name=name)
    if function in files:
        return _function(registry, target, function, name) if run_functions else ExactMatch()
    metric = named_metric(name)
    return named_metric(metric.watched_by) if metric.watched_by else metric


def _function(registry: Registry, target: Target, file: str, name: str) -> Metric:
    options = registry.manifest(target.version).recipe.get("evaluate", {})
    named = [options.get("primary"), *(options.get("metrics") or ())]
    specs = (FunctionSpec.parse(text) for text in named if text)
    spec = next(spec for spec in specs if spec and spec.name == name)
    copy = FunctionSpec(registry.reference(target.version, file), spec.function)
    return FunctionMetric(copy, options.get("metric_seconds", 60.0), name)
