"""Checks a version's speed as measured at registration: tokens per second and time to the first token."""

from svc.errors import IntegrityError, NotFoundError
from svc.evaluation.intervals import Interval
from svc.evaluation.quiet_machine import MAX_OTHERS_SHARE
from svc.evaluation.throughput import STREAMS
from svc.registry.manifest import Manifest
from svc.registry.parity import Speed
from svc.registry.registry import Registry
from svc.store.gate_rows import GateRow, GateVerdict
from svc.version import Format, Target

_NAMES = ("speed", "first_token")
_OF_FORMAT = frozenset({"kernel", "dtype"})
"""Engine properties that depend on the served format. Speeds are only comparable if all other properties are
equal."""


def check_speed(
    registry: Registry, candidate: Target, production: Target, margin: float | None
) -> tuple[GateRow, GateRow]:
    """Return the results of the gates on tokens per second and on the time to the first token.

    Args:
        margin: largest acceptable slowdown, as a share of production's value, or None for no limit.
    """
    if candidate == production:
        return _both(GateVerdict.SKIPPED, "the version is in production")
    if Format.ADAPTER in (candidate.format, production.format):
        return _both(GateVerdict.SKIPPED, "not measured for adapters")
    after = registry.manifest(candidate.version)
    try:
        before = registry.manifest(production.version)
    except (NotFoundError, IntegrityError) as error:  # it must still be possible to replace it
        return _both(GateVerdict.UNDECIDED, error.wrong)
    if _is_same_model(after.formats[candidate.format].fingerprint, before.formats[production.format].fingerprint):
        return _both(GateVerdict.SKIPPED, "architecture, quantization and tokenizer are the same as in production")
    now, then = _speed(after, candidate.format), _speed(before, production.format)
    if now is None or then is None:
        return _both(GateVerdict.UNDECIDED, "not measured for both versions")
    facts = [_facts(manifest, target.format) for manifest, target in ((after, candidate), (before, production))]
    if len(facts[0] | facts[1]) != 1:
        return _both(GateVerdict.UNDECIDED, "measured on different kinds of engine")
    if (busy := max(now.others_share, then.others_share)) > MAX_OTHERS_SHARE:
        reason = f"other processes used {100 * busy:.0f}% of the processors during the measurement"
        return _both(GateVerdict.UNDECIDED, reason)
    decoded = [speed.tokens_per_second.get(STREAMS) for speed in (then, now)]
    first = [speed.first_token_seconds for speed in (then, now)]
    speeds = GateRow(
        gate=_NAMES[0], verdict=GateVerdict.UNDECIDED, reason=f"not measured with {STREAMS} concurrent streams"
    )
    if decoded[0] is not None and decoded[1] is not None:
        speeds = _judged(_NAMES[0], "tokens/s", decoded[0], decoded[1], _slowdown(decoded[0], decoded[1]), margin)
    return speeds, _judged(_NAMES[1], "s", first[0], first[1], _slowdown(first[1], first[0]), margin)


def _is_same_model(candidate: str | None, production: str | None) -> bool:
    """Return whether two formats differ only in their weights' values, according to their fingerprints.

    An engine then does the same work for both, so a difference in speed is measurement noise. For example, two versions
    of one recipe, registered an hour apart on a shared machine, had times to first token of 0.181 s (confidence
    interval 0.16 to 0.20 s) and 0.311 s.
    """
    return candidate is not None and candidate == production


def _speed(manifest: Manifest, format: Format) -> Speed | None:
    return manifest.parity.speed.get(format) if manifest.parity else None


def _facts(manifest: Manifest, format: Format) -> frozenset[str]:
    """Return the properties of the engines on which a format's probes were recorded, except for the properties in
    `_OF_FORMAT`. All properties of an engine form one string, so that engines can be compared for equality.
    """
    probes = manifest.formats[format].probes
    return frozenset(probe.engine.model_dump_json(exclude=set(_OF_FORMAT)) for probe in probes)


def _slowdown(first: Interval, second: Interval) -> Interval:
    """Return by how much the first value exceeds the second, as a fraction of the second. Both must be above 0."""
    return Interval(
        value=first.value / second.value - 1, low=first.low / second.high - 1, high=first.high / second.low - 1
    )


def _judged(
    gate: str, unit: str, before: Interval, after: Interval, slowdown: Interval, margin: float | None
) -> GateRow:
    measured = f"{before.value:.3g} {unit} in production, {after.value:.3g} candidate; slower by {slowdown}"
    if margin is None:
        return GateRow(gate=gate, measured=measured, verdict=GateVerdict.SKIPPED, reason="no margin is set")
    verdict, reason = GateVerdict.UNDECIDED, "the measured speeds vary too much"
    if slowdown.high <= margin:
        verdict, reason = GateVerdict.PASSED, ""
    elif slowdown.low > margin:
        verdict, reason = GateVerdict.FAILED, ""
    return GateRow(gate=gate, measured=measured, limit=f"at most {margin:g}", verdict=verdict, reason=reason)


def _both(verdict: GateVerdict, reason: str) -> tuple[GateRow, GateRow]:
    first, second = (GateRow(gate=name, verdict=verdict, reason=reason) for name in _NAMES)
    return first, second
