"""Changes a model's desired version, after checking that the version may be served.

The swap journal shows whether the change was carried out.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy import Engine as Store

from serving.rollout.gates.gates import Promotion, check_gates, refused, refusing_gates
from serving.rollout.initial_state import require_servable
from serving.rollout.promotion import PromotionRequest, VersionChange
from svc.errors import BusyError, NotFoundError, RefusedError
from svc.identity.actor import Actor
from svc.registry.registry import Registry
from svc.settings.settings import ModelSettings
from svc.store.audit import Action, AuditEntry
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.gate_rows import GateRow
from svc.store.rollouts import active_rollout, begin_rollout, stop_rollout
from svc.version import Target


class VersionChanges:
    """Changes the desired versions, and requests or stops rollouts.

    Args:
        served: function that returns the version served under each name, which may not be the desired version yet.
        configured: function that returns a model's settings, including its gates and rollout steps.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        served: Callable[[], Mapping[str, Target]],
        configured: Callable[[str], ModelSettings],
    ) -> None:
        self._registry = registry
        self._store = store
        self._served = served
        self._configured = configured

    def promote(self, request: PromotionRequest, actor: Actor) -> VersionChange:
        """Make a version the desired one, or request a rollout if there are shadow or canary steps.

        Raises:
            NotFoundError: there is no such version or format, or the name is not served.
            RefusedError: the version cannot be served.
            GateError: a gate refuses the version.
            SettingsError: the rollout's options are invalid.
            BusyError: a promotion or rollout is in progress, or the desired version was changed concurrently.
        """
        version, reason = request.version, request.reason
        configured = self._configured(version.name)
        plan = request.steps.plan(configured.rollout)
        current, served = self._current(version.name)
        target = Target(version, request.format or current.target.format)
        require_servable(self._registry, target)
        promote = AuditEntry(Action.PROMOTE, str(version), actor, reason)
        if not request.dry_run:
            self._refuse_during_rollout(version.name)
            if target == current.target:
                return self._change(current, served, target, promote)
            if plan.is_gradual:
                _require_comparable(current, served, target)
        gates = check_gates(Promotion(self._registry, target, current.target), configured.gates, datetime.now(UTC))
        refusing = refusing_gates(gates, configured.gates)
        if request.dry_run:
            return VersionChange(
                target, current.target, None, gates=gates, refused=bool(refusing) and not request.force
            )
        if refusing and not request.force:
            raise refused(version, refusing)
        forced = reason if refusing else None
        if plan.is_gradual:
            entry = AuditEntry(Action.ROLLOUT, str(version), actor, reason)
            rollout = begin_rollout(self._store, current, target, plan, entry, forced=forced, gates=gates)
            return VersionChange(target, current.target, None, rollout=rollout.id, gates=gates)
        return replace(self._change(current, served, target, promote, forced, gates), gates=gates)

    def rollback(self, name: str, *, reason: str | None, actor: Actor) -> VersionChange:
        """Make the previous version the desired one.

        During a promotion, the version that is still being served becomes the desired version again. During a rollout,
        the rollout is stopped instead, so the version in production does not change.

        Raises:
            NotFoundError: the name is not served, or no previous version is recorded for it.
            BusyError: the desired version was changed concurrently.
        """
        current, served = self._current(name)
        stop = AuditEntry(Action.ROLLBACK, str(current.target.version), actor, reason)
        why = f"rolled back by {actor.name}" + (f": {reason}" if reason else "")
        if stopped := stop_rollout(self._store, name, why, stop):
            return VersionChange(current.target, stopped.target, None, rollout=stopped.id)
        # During a promotion the served version stays: the previously desired one may never have been served.
        target = served if served != current.target else current.previous
        if target is None:
            raise NotFoundError(
                f"{name} has no version before {current.target} to roll back to",
                todo=f"promote a version: svc promote {name}@N",
            )
        entry = AuditEntry(Action.ROLLBACK, str(target.version), actor, reason)
        return self._change(current, served, target, entry)

    def _refuse_during_rollout(self, name: str) -> None:
        if rollout := active_rollout(self._store, name):
            raise BusyError(
                f"a rollout of {rollout.target} is in progress",
                todo=f"wait for it (svc rollout {name}), or stop it: svc rollback {name}",
            )

    def _current(self, name: str) -> tuple[Desired, Target]:
        """Return a model's desired state, and the version that is currently served under its name."""
        served = self._served()
        desired = read_desired(self._store, name) if name in served else None
        if desired is None:
            raise NotFoundError(
                f"{name!r} is not served",
                expected=f"a served model: {', '.join(served) or 'none'}",
                todo=f"svc add {name}",
            )
        return desired, served[name]

    def _change(
        self,
        current: Desired,
        served: Target,
        target: Target,
        entry: AuditEntry,
        forced: str | None = None,
        gates: tuple[GateRow, ...] = (),
    ) -> VersionChange:
        if target == current.target:
            if served != target:
                raise BusyError(f"the promotion of {target} is already in progress", todo="see `svc status`")
            return VersionChange(target, current.target, None)
        changed = change_desired(
            self._store, current, target, previous=current.target, forced=forced, entry=entry, gates=gates
        )
        return VersionChange(target, current.target, changed.generation)


def _require_comparable(current: Desired, served: Target, target: Target) -> None:
    """Check that a rollout can compare the version in production with another version."""
    if served != current.target:
        raise BusyError(f"the promotion of {current.target} is in progress", todo="see `svc status`")
    if target.version == served.version:
        raise RefusedError(
            f"{target} is the production version in another format, and a rollout cannot compare formats",
            todo=f"change the format in a single swap: svc promote {target.version} --format {target.format} --direct",
        )
