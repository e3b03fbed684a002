"""Versions with results of any quality, registered without an engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.rollout.gates.gates import Promotion
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.metrics.text import ExactMatch
from svc.evaluation.results import ExampleResult, write_results
from svc.registry.files import record_files
from svc.registry.manifest import Manifest, read_manifest, write_manifest
from svc.registry.registry import BASE_RESULTS_FILE, REFERENCE_FOLDER, Registry, results_file
from svc.store.gate_rows import GateRow
from svc.version import Format, VersionId
from tests.serving.versions import AliasBook, make_version, target
from tests.svc.registry.manifests import report
from tests.svc.registry.parity import make_parity


def new_registry(home: Path) -> Registry:
    """Return an empty registry."""
    return Registry(home / "models", AliasBook())


def results(hits: Sequence[bool], nll: float = 1.0, *, scored: int = 3) -> list[ExampleResult]:
    """Return one result per example; the NLL varies a little from example to example."""
    return [
        ExampleResult(
            answer="a",
            tokens=2,
            limit=3,
            finish_reason="stop",
            logprob=-0.5,
            nll=nll + 0.01 * (place % 5),
            scored=scored,
            hit=hit,
            scores={ExactMatch.name: float(hit)},
        )
        for place, hit in enumerate(hits)
    ]


def register(
    registry: Registry,
    number: int,
    right: int = 80,
    total: int = 100,
    *,
    nll: float = 1.0,
    scored: int = 3,
    base_right: int | None = None,
    formats: tuple[Format, ...] = (Format.MERGED,),
    evaluation: EvaluationReport | None = None,
    **changes: Any,
) -> VersionId:
    """Register a version whose results are right for the first examples.

    Args:
        right: number of held-out examples that it answers correctly.
        nll, scored: negative log-likelihood of each reference, and its number of tokens.
        base_right: the same number for its base; None if the base was not evaluated.
        evaluation: replaces the report of the merged format.
        changes: fields of the manifest.
    """
    version = make_version(registry, number, formats=formats, answered=1)
    folder = registry.folder(version)
    reference = folder / REFERENCE_FOLDER
    write_results(
        reference / results_file(Format.MERGED), results([at < right for at in range(total)], nll, scored=scored)
    )
    if base_right is not None:
        write_results(reference / BASE_RESULTS_FILE, results([at < base_right for at in range(total)], nll + 1))
    manifest = read_manifest(folder)
    records = dict(manifest.formats)
    merged = {"evaluation": evaluation or report(right, total)}
    records[Format.MERGED] = records[Format.MERGED].model_copy(update=merged)
    new = {
        "formats": records,
        "parity": make_parity(),
        "reference": record_files(folder, reference),
        "base_evaluation": None if base_right is None else report(base_right, total),
    }
    edit(registry, version, **(new | changes))
    return version


def edit(registry: Registry, version: VersionId, **changes: Any) -> Manifest:
    """Change a registered manifest."""
    folder = registry.folder(version)
    manifest = read_manifest(folder).model_copy(update=changes)
    write_manifest(folder, manifest)
    return manifest


def promotion(registry: Registry, candidate: int = 2, production: int = 1, format: Format = Format.MERGED) -> Promotion:
    """Return the promotion of one version over another one."""
    return Promotion(registry, target(candidate, format), target(production, format))


def row(rows: Sequence[GateRow], gate: str) -> GateRow:
    """Return the row of a gate."""
    (found,) = (row for row in rows if row.gate == gate)
    return found
