"""Checks all gates of a promotion, in the order in which they are displayed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from serving.rollout.gates.custom import check_custom
from serving.rollout.gates.integrity import check_freshness, check_integrity
from serving.rollout.gates.quality import check_forgetting, check_quality, check_registration
from serving.rollout.gates.speed import check_speed
from svc.errors import GateError
from svc.registry.registry import Registry
from svc.settings.gates import GateSettings, UndecidedGates
from svc.store.gate_rows import GateRow, GateVerdict
from svc.version import Target, VersionId


@dataclass(frozen=True, slots=True)
class Promotion:
    """A promotion whose gates are to be checked.

    Attributes:
        production: the desired version, which the promotion would replace.
    """

    registry: Registry
    candidate: Target
    production: Target


def check_gates(promotion: Promotion, settings: GateSettings, now: datetime) -> tuple[GateRow, ...]:
    """Check all gates of a promotion, and return their results.

    Files of the candidate that are not on this machine are downloaded first.

    A gate that cannot be checked does not raise an error; its result is undecided or failed.

    Raises:
        NotFoundError: a version does not exist.
        IntegrityError: a version's manifest cannot be read.
        DiskSpaceError, RegistryError: the candidate's files could not be downloaded from the object store.
    """
    registry, candidate, production = promotion.registry, promotion.candidate, promotion.production
    manifest = registry.manifest(candidate.version)
    folder = registry.artifact(candidate.version, candidate.format).parent
    return (
        *check_integrity(folder, manifest, candidate.format),
        *check_quality(registry, candidate, production, settings),
        *check_registration(manifest),
        check_forgetting(manifest, candidate.format, settings.forgetting_margin),
        *check_speed(registry, candidate, production, settings.speed_margin),
        check_freshness(manifest, settings.max_age_days, now),
        *(check_custom(gate, candidate, production, folder, manifest.created_at) for gate in settings.custom),
    )


def refusing_gates(gates: Sequence[GateRow], settings: GateSettings) -> tuple[GateRow, ...]:
    """Return the gates that block a promotion: all failed gates and, depending on the settings, undecided gates."""
    verdicts = {GateVerdict.FAILED}
    if settings.undecided is UndecidedGates.REFUSE:
        verdicts.add(GateVerdict.UNDECIDED)
    return tuple(gate for gate in gates if gate.verdict in verdicts)


def refused(version: VersionId, refusing: Sequence[GateRow]) -> GateError:
    """Return the error to raise when gates block a promotion."""
    return GateError(
        f"{version} did not pass every gate:\n" + "\n".join(f"  {gate}" for gate in refusing),
        todo=f"fix the cause and train again, or force the promotion: svc promote {version} --force --reason TEXT",
    )
