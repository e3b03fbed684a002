"""Types for promotion requests and their results.

This module does not import the gates, which only the server checks.
"""

from dataclasses import dataclass

from pydantic import ValidationError

from svc.errors import SettingsError
from svc.settings.rollout import RolloutSettings
from svc.store.gate_rows import GateRow, GateVerdict
from svc.version import Format, Target, VersionId


@dataclass(frozen=True, slots=True)
class VersionChange:
    """Result of a request to change a model's desired version.

    Attributes:
        before: the desired version before the change.
        generation: generation of the new desired state, or None if the state did not change because the target
            is already served, a rollout was requested or stopped, or it was a dry run.
        rollout: id of the rollout that was requested or stopped, or None if there is none.
        gates: results of the promotion's gates.
        refused: whether the gates would refuse the promotion. Only set by a dry run.
    """

    target: Target
    before: Target
    generation: int | None
    rollout: int | None = None
    gates: tuple[GateRow, ...] = ()
    refused: bool = False

    @property
    def undecided(self) -> tuple[str, ...]:
        """The undecided gates, each described in a sentence."""
        return tuple(str(gate) for gate in self.gates if gate.verdict is GateVerdict.UNDECIDED)


@dataclass(frozen=True, slots=True)
class RolloutOptions:
    """Steps for a single promotion, which override the configured steps.

    Attributes:
        shadow, canary: see `svc.settings.rollout.RolloutSettings`. None keeps the configured value.
        direct: promote in a single swap, without any of the configured steps.
    """

    shadow: int | None = None
    canary: tuple[float, ...] | None = None
    direct: bool = False

    def plan(self, configured: RolloutSettings) -> RolloutSettings:
        """Return the configured steps, except where this object overrides them.

        Raises:
            SettingsError: a value is invalid, or the options contradict each other.
        """
        if self.direct and (self.shadow or self.canary):
            raise SettingsError(
                "a direct promotion has no shadow or canary steps", todo="omit 'direct', or omit 'shadow' and 'canary'"
            )
        steps = {"shadow": self.shadow, "canary": self.canary}
        given = (
            {"shadow": 0, "canary": ()} if self.direct else {key: steps[key] for key in steps if steps[key] is not None}
        )
        try:
            return RolloutSettings.model_validate(configured.model_dump() | given)
        except ValidationError as error:
            first = error.errors()[0]
            raise SettingsError(f"{first['loc'][0] if first['loc'] else 'rollout'}: {first['msg']}") from error


@dataclass(frozen=True, slots=True)
class PromotionRequest:
    """A request to promote a version.

    Attributes:
        format: format to serve, or None to keep the format of the currently desired version.
        force: whether to promote the version even if a gate refuses it.
        reason: the operator's reason for the promotion, for the audit log.
        steps: steps that override the configured steps.
        dry_run: whether to check the gates without changing anything.
    """

    version: VersionId
    format: Format | None = None
    force: bool = False
    reason: str | None = None
    steps: RolloutOptions = RolloutOptions()
    dry_run: bool = False
