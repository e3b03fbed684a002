"""The primary metric of a version, stored with it so that the same metric evaluates it again on any machine.

Most metrics are a name. A schema or a user's function is a file in the folder of the held-out answers.
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
        folder: that becomes `REFERENCE_FOLDER` of a version.
    """
    match metric:
        case SchemaValid():
            (folder / _SCHEMA).write_text(json.dumps(metric.schema, indent=1), "utf-8")
        case FunctionMetric():
            shutil.copyfile(metric.spec.path, folder / _FUNCTION.format(name=metric.name))


def watched_metric(registry: Registry, target: Target, *, run_functions: bool) -> Metric:
    """Return the metric that scores each held-out example: the primary metric, or the one that it is watched by.

    Args:
        run_functions: whether the version's own function may run, which is code of the user who registered it.

    Raises:
        NotFoundError: no such version or format.
        RecipeError: the metric is not installed here.
        IntegrityError: a file of the metric is missing or was changed.
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
