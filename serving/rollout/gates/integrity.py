"""Checks the version itself: whether it is complete, was checked at registration, and is recent enough."""

from datetime import datetime
from pathlib import Path

from svc.registry.manifest import Manifest
from svc.store.gate_rows import GateRow, GateVerdict
from svc.version import Format

_DAY_S = 86_400


def check_integrity(folder: Path, manifest: Manifest, format: Format) -> tuple[GateRow, ...]:
    """Return the results of the gates on a version's registration, files, parity report, probes and license."""
    return (
        _check_registration(manifest),
        _check_files(folder, manifest, format),
        _check_parity(manifest),
        _check_probes(manifest, format),
        _check_licence(manifest),
    )


def check_freshness(manifest: Manifest, max_age_days: float | None, now: datetime) -> GateRow:
    """Return the result of the gate that limits the age of a version's training data and of its evaluation. The
    version's creation time counts as the time of its evaluation.
    """
    data_at = manifest.data.modified_at
    data = None if data_at is None else _days(now, data_at)
    evaluation = _days(now, manifest.created_at)
    shown = "data of unknown age" if data is None else f"data {data:.1f} days"
    measured = f"{shown}, evaluation {evaluation:.1f} days"
    if max_age_days is None:
        return GateRow(gate="freshness", measured=measured, verdict=GateVerdict.SKIPPED, reason="no limit is set")
    limit, reason = f"at most {max_age_days:g} days", ""
    if max(evaluation, data or 0.0) > max_age_days:
        verdict = GateVerdict.FAILED
    elif data is None:
        verdict, reason = GateVerdict.UNDECIDED, "the age of the version's training files is not recorded"
    else:
        verdict = GateVerdict.PASSED
    return GateRow(gate="freshness", measured=measured, limit=limit, verdict=verdict, reason=reason)


def _days(now: datetime, at: datetime) -> float:
    """Return the days since a time, or 0 if it is in the future because another machine's clock was wrong."""
    return max(0.0, (now - at).total_seconds() / _DAY_S)


def _check_registration(manifest: Manifest) -> GateRow:
    count = len(manifest.failed)
    return GateRow(
        gate="checks",
        measured=f"{count or 'no'} check{'s' if count > 1 else ''} failed at registration",
        limit="none" if count else "",
        verdict=GateVerdict.FAILED if count else GateVerdict.PASSED,
        reason="; ".join(manifest.failed),
    )


def _check_files(folder: Path, manifest: Manifest, format: Format) -> GateRow:
    """Check that a version's files exist and have the right size.

    Hashes are not checked, because that takes minutes for a large model. The swap checks them before it loads
    the files.
    """
    records = [manifest.heldout, *manifest.reference, *manifest.formats[format].files]
    wrong = [record.path for record in records if _size(folder / record.path) != record.bytes]
    reason = f"missing or with a different size: {', '.join(wrong[:3])}" if wrong else "hashes are checked by the swap"
    return GateRow(
        gate="files",
        measured=f"{len(records) - len(wrong)} of {len(records)} files have their registered size",
        limit="all",
        verdict=GateVerdict.FAILED if wrong else GateVerdict.PASSED,
        reason=reason,
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _check_parity(manifest: Manifest) -> GateRow:
    report = manifest.parity
    if report is None:
        if set(manifest.formats) == {Format.ADAPTER}:
            return GateRow(
                gate="parity", verdict=GateVerdict.SKIPPED, reason="not measured for versions with only an adapter"
            )
        return GateRow(gate="parity", verdict=GateVerdict.UNDECIDED, reason="the version has no parity report")
    passed = len(report.checks) - len(report.failed)
    return GateRow(
        gate="parity",
        measured=f"{passed} of {len(report.checks)} checks passed",
        limit="all",
        verdict=GateVerdict.FAILED if report.failed else GateVerdict.PASSED,
        reason="; ".join(report.failed),
    )


def _check_probes(manifest: Manifest, format: Format) -> GateRow:
    records = manifest.formats.values() if format is Format.ADAPTER else [manifest.formats[format]]
    count = sum(len(record.probes) for record in records)
    if not count:
        return GateRow(
            gate="probes",
            verdict=GateVerdict.UNDECIDED,
            reason="the version has no probes, so its loaded weights cannot be verified",
        )
    return GateRow(gate="probes", measured=f"{count} probes", limit="at least 1", verdict=GateVerdict.PASSED)


def _check_licence(manifest: Manifest) -> GateRow:
    licence = manifest.base.licence
    if licence is None:
        return GateRow(gate="licence", verdict=GateVerdict.UNDECIDED, reason="the base's publisher states no license")
    return GateRow(gate="licence", measured=licence, verdict=GateVerdict.PASSED)
