"""Compares a version's quality with production's, using the per-example results recorded at registration.

No code from a version is run: if a metric scores examples, its scores are read from the stored results.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from svc.errors import IntegrityError, NotFoundError, RecipeError
from svc.evaluation.evaluator import EvaluationReport, MetricReport
from svc.evaluation.intervals import Interval
from svc.evaluation.loss import MIN_DIFFERENCES, MIN_NLL_MARGIN, metric_loss, nll_loss
from svc.evaluation.metrics.choose import named_metric
from svc.evaluation.metrics.metric import Answered, Metric, Unit
from svc.evaluation.metrics.tokens import Nll
from svc.evaluation.results import ExampleResult
from svc.evaluation.verdict import Gate, GateReport, Verdict, verdict_of
from svc.registry.manifest import Manifest
from svc.registry.registry import HELDOUT_FILE, Registry
from svc.settings.gates import GateSettings
from svc.store.gate_rows import GateRow, GateVerdict
from svc.version import Format, Target

_NO_MARGIN = "no margin is set"


@dataclass(frozen=True, slots=True)
class _Arm:
    """The evaluation results of a version or a base model, as recorded at registration."""

    name: str
    report: EvaluationReport
    results: Sequence[ExampleResult]


class _IncomparableError(Exception):
    """Raised when two versions cannot be compared. The message is the reason."""


class _Stored(Metric):
    """A metric whose scores are read from the stored results rather than computed."""

    def __init__(self, name: str, report: MetricReport) -> None:
        self.name, self.title, self.better, self.unit = name, report.title, report.better, report.unit

    def score(self, answered: Answered) -> list[float]:
        return self.stored_scores(answered)


def check_quality(
    registry: Registry, candidate: Target, production: Target, settings: GateSettings
) -> tuple[GateRow, GateRow]:
    """Return the results of the gates on the primary metric and on the NLL.

    The candidate is compared with the version in production, or with its own base if the candidate is already
    in production.
    """
    try:
        before, after = _arms(registry, candidate, production)
        nll = _check_nll(before, after, settings.nll_margin)
    except (_IncomparableError, NotFoundError) as error:
        return _both(GateVerdict.UNDECIDED, str(error))
    except IntegrityError as error:
        return _both(GateVerdict.FAILED, error.wrong)
    try:
        return _check_metric(registry, candidate, before, after, settings.quality_margin), nll
    except (_IncomparableError, RecipeError) as error:
        return GateRow(gate="quality", verdict=GateVerdict.UNDECIDED, reason=str(error)), nll
    except IntegrityError as error:
        return GateRow(gate="quality", verdict=GateVerdict.FAILED, reason=error.wrong), nll


def _both(verdict: GateVerdict, reason: str) -> tuple[GateRow, GateRow]:
    return GateRow(gate="quality", verdict=verdict, reason=reason), GateRow(gate="nll", verdict=verdict, reason=reason)


def check_registration(manifest: Manifest) -> tuple[GateRow, ...]:
    """Return the results of the gates that the recipe configured for registration."""
    return tuple(
        _row(_name(report), report.measured, report.verdict, report.limit, report.gate.counted)
        for report in manifest.gates
    )


def _name(report: GateReport) -> str:
    format = report.format or Format.GPTQ
    names = {Gate.GPTQ_LOSS: f"{format}_quality", Gate.GPTQ_NLL: f"{format}_nll", Gate.FORGETTING: "recipe_forgetting"}
    return names[report.gate]


def check_forgetting(manifest: Manifest, format: Format, margin: float | None) -> GateRow:
    """Return the result of the `forgetting` gate, which limits the loss of correct answers to general questions."""
    forgetting = manifest.forgetting.get(evaluated_format(format))
    if forgetting is None:
        reason = "no general questions were asked"
        verdict = GateVerdict.SKIPPED if margin is None else GateVerdict.UNDECIDED
        return GateRow(gate="forgetting", verdict=verdict, reason=reason)
    measured = f"correct answers: {forgetting.before.value:.3f} base, {forgetting.after.value:.3f} version"
    return _judged("forgetting", measured, forgetting.loss, margin, forgetting.examples, counted="questions")


def evaluated_format(format: Format) -> Format:
    """Return the format that was evaluated at registration. For an adapter, this is the merged format."""
    return Format.MERGED if format is Format.ADAPTER else format


def _arms(registry: Registry, candidate: Target, production: Target) -> tuple[_Arm, _Arm]:
    """Return the two sets of results to compare, limited to the examples that both contain.

    The results of the version in production, or of the base, come first.

    Raises:
        _IncomparableError, NotFoundError: results are missing, or cannot be compared, for example because the
            held-out examples differ.
        IntegrityError: stored results were changed.
    """
    manifest = registry.manifest(candidate.version)
    after = _arm(registry, candidate, manifest)
    if candidate == production:
        if manifest.base_evaluation is None:
            raise _IncomparableError(
                f"{manifest.id} is in production, so it can be compared only with its base, which was not evaluated"
            )
        before = _Arm("base", manifest.base_evaluation, registry.base_results(candidate.version))
    else:
        before = _production(registry, production, manifest)
    if before.report.primary != after.report.primary:
        raise _IncomparableError(
            f"the primary metrics differ: {before.report.primary} and {after.report.primary}; to compare the versions: "
            f"svc compare {before.name} {after.name}"
        )
    count = min(len(before.results), len(after.results))
    if not count:
        raise _IncomparableError(f"the registered results of {before.name} or of {after.name} are empty")
    return replace(before, results=before.results[:count]), replace(after, results=after.results[:count])


def _production(registry: Registry, production: Target, candidate: Manifest) -> _Arm:
    """Return the results of the version in production.

    A damaged version counts as incomparable, so that it can still be replaced.

    Raises:
        _IncomparableError, NotFoundError: the results are missing or damaged, or cannot be compared with the
            candidate's, for example because the held-out examples differ.
    """
    try:
        manifest = registry.manifest(production.version)
        _require_same_examples(registry, candidate, manifest)
        return _arm(registry, production, manifest)
    except IntegrityError as error:
        raise _IncomparableError(f"cannot read the results of {production.version}: {error.wrong}") from error


def _arm(registry: Registry, target: Target, manifest: Manifest) -> _Arm:
    format = evaluated_format(target.format)
    record = manifest.formats.get(format)
    if record is None or record.evaluation is None:
        raise _IncomparableError(f"{target.version} was not evaluated in format {format}")
    return _Arm(str(target.version), record.evaluation, registry.results(target.version, format))


def _require_same_examples(registry: Registry, candidate: Manifest, production: Manifest) -> None:
    if candidate.data.heldout_fingerprint != production.data.heldout_fingerprint:
        heldout = registry.folder(production.id) / HELDOUT_FILE
        raise _IncomparableError(
            f"{candidate.id} and {production.id} have different held-out examples; to compare the versions: "
            f"svc compare {production.id} {candidate.id} --data {heldout}"
        )
    if candidate.max_answer_tokens != production.max_answer_tokens:
        raise _IncomparableError(
            f"{candidate.id} and {production.id} were evaluated with different evaluate.max_tokens; to compare the "
            f"versions: svc compare {production.id} {candidate.id}"
        )


def _check_metric(registry: Registry, candidate: Target, before: _Arm, after: _Arm, margin: float | None) -> GateRow:
    metric = _metric(before, after)
    examples = () if metric.scored else registry.heldout(candidate.version)[: len(after.results)]
    one, other = Answered(examples, before.results), Answered(examples, after.results)
    value, loss = metric.estimate(one), metric_loss(metric, one, other)
    relative = metric.unit is not Unit.SHARE
    measured = f"{metric.title}: {value.value:.3f} {before.name}, {metric.estimate(other).value:.3f} {after.name}"
    if margin is not None and relative:
        margin *= abs(value.value)
    return _judged("quality", measured, loss, margin, len(after.results), fewest=MIN_DIFFERENCES if relative else 1)


def _metric(before: _Arm, after: _Arm) -> Metric:
    """Return the primary metric, as used to compare the two sets of results.

    Raises:
        _IncomparableError: the results contain no scores for this metric.
        RecipeError: the metric is not installed on this machine.
    """
    name = after.report.primary
    if all(name in result.scores for result in (*before.results, *after.results)):
        return _Stored(name, after.report.metrics[name])
    metric = named_metric(name)
    if metric.scored:
        raise _IncomparableError(f"the registered results have no scores for {name}")
    return metric


def _check_nll(before: _Arm, after: _Arm, margin: float | None) -> GateRow:
    if [result.scored for result in before.results] != [result.scored for result in after.results]:
        return GateRow(gate="nll", verdict=GateVerdict.UNDECIDED, reason="the tokenizers or chat templates differ")
    values = [Nll().estimate(Answered((), arm.results)).value for arm in (before, after)]
    measured = f"nats per token: {values[0]:.3f} {before.name}, {values[1]:.3f} {after.name}"
    if margin is not None:
        margin = max(margin * values[0], MIN_NLL_MARGIN)
    loss = nll_loss(before.results, after.results)
    return _judged("nll", measured, loss, margin, len(after.results), fewest=MIN_DIFFERENCES)


def _judged(
    gate: str,
    measured: str,
    loss: Interval,
    margin: float | None,
    examples: int,
    *,
    fewest: int = 1,
    counted: str = "examples",
) -> GateRow:
    if margin is None:
        measured = f"{measured}; loss {loss}"
        return GateRow(gate=gate, measured=measured, verdict=GateVerdict.SKIPPED, reason=_NO_MARGIN)
    return _row(gate, measured, verdict_of(loss, margin, examples, fewest=fewest), "", counted)


def _row(gate: str, measured: str, verdict: Verdict, source: str, counted: str) -> GateRow:
    return GateRow(
        gate=gate,
        measured=f"{measured}; loss {verdict.loss}",
        limit=f"loss of at most {verdict.margin:.3f}" + (f" ({source})" if source else ""),
        verdict=GateVerdict(verdict.outcome),
        reason=verdict.reason(counted),
    )
