"""The report's figures for machines: no texts, which are in the version's own files."""

from dataclasses import asdict
from typing import Any

from svc.evaluation.estimate import Estimate
from svc.report.judged import Verdict
from svc.report.report import Report
from svc.report.shown_example import ShownExample


def report_figures(report: Report) -> dict[str, Any]:
    """As JSON takes it; examples by their line in the held-out file."""
    return {
        "version": str(report.manifest.id),
        "models": list(report.models),
        "verdicts": [_verdict(verdict) for verdict in report.verdicts],
        "metrics": {
            row.name: {
                "estimates": {model: _values(found) for model, found in row.estimates.items()},
                "changes": {model: _values(found) for model, found in row.changes.items()},
                "better": row.better.value,
            }
            for row in report.metrics
        },
        "failed": list(report.manifest.failed),
        "confusion": asdict(report.confusion) if report.confusion else None,
        "curve": [point.model_dump(exclude={"heldout_each"}) for point in report.curve],
        "worst": _numbers(report.worst),
        "lost": _numbers(report.lost),
        "side_by_side": _numbers(report.side_by_side),
        "data": report.data.model_dump(),
        "run": report.run.model_dump(),
        "findings": [finding.model_dump(mode="json") for finding in report.manifest.findings],
        "forgetting": report.manifest.forgetting.model_dump() if report.manifest.forgetting else None,
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "model": verdict.model,
        "other": verdict.other,
        "outcome": verdict.outcome.value,
        "value": _values(verdict.value),
        "before": _values(verdict.before),
        "change": _values(verdict.change),
    }


def _numbers(shown: tuple[ShownExample, ...]) -> list[int]:
    return [one.number for one in shown]


def _values(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate.model_dump()
