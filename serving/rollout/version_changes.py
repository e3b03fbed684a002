"""Changes a model's desired version: checks whether the version may be served, and writes the change.

The journal of swaps shows whether the change was carried out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sqlalchemy import Engine as Store

from serving.rollout.initial_state import require_promotable, require_servable
from svc.errors import BusyError, NotFoundError
from svc.identity.actor import Actor
from svc.registry.registry import Registry
from svc.store.audit import Action, AuditEntry
from svc.store.desired import Desired, change_desired, read_desired
from svc.version import Format, Target, VersionId


@dataclass(frozen=True, slots=True)
class VersionChange:
    """A change of a name's desired version.

    Attributes:
        before: the desired version before the change.
        generation: generation of the new desired state; None if the target is already served, so that nothing changes.
        undecided: quality gates that the version had too few examples to decide, each as a sentence.
    """

    target: Target
    before: Target
    generation: int | None
    undecided: tuple[str, ...] = ()


class VersionChanges:
    """Writes desired versions.

    Args:
        served: returns the version that the server serves under each name, which may not be the desired one yet.
    """

    def __init__(self, registry: Registry, store: Store, served: Callable[[], Mapping[str, Target]]) -> None:
        self._registry = registry
        self._store = store
        self._served = served

    def promote(
        self, version: VersionId, format: Format | None, *, force: bool, reason: str | None, actor: Actor
    ) -> VersionChange:
        """Make a version the desired one.

        Args:
            format: None for the format of the version that is desired now.
            force: promote the version even if it failed a check at registration; `reason` says why.

        Raises:
            NotFoundError: no such version or format, or the name is not served.
            RefusedError: the version cannot be served, or failed a check.
            BusyError: the version's promotion is in progress, or the desired version was changed concurrently.
        """
        current, served = self._current(version.name)
        target = Target(version, format or current.target.format)
        require_servable(self._registry, target)
        manifest = self._registry.manifest(version)
        if not force:
            require_promotable(manifest)
        entry = AuditEntry(Action.PROMOTE, str(version), actor, reason)
        change = self._change(current, served, target, entry, forced=reason if manifest.failed else None)
        return replace(change, undecided=manifest.undecided)

    def rollback(self, name: str, *, reason: str | None, actor: Actor) -> VersionChange:
        """Make the previous version the desired one; during a promotion, the version that is being served.

        Raises:
            NotFoundError: the name is not served, or has no previous version.
            BusyError: the desired version was changed concurrently.
        """
        current, served = self._current(name)
        # During a promotion the served version stays: the previously desired one may never have been served.
        target = served if served != current.target else current.previous
        if target is None:
            raise NotFoundError(
                f"{name} has no version before {current.target} to return to", todo=f"promote one: svc promote {name}@N"
            )
        entry = AuditEntry(Action.ROLLBACK, str(target.version), actor, reason)
        return self._change(current, served, target, entry)

    def _current(self, name: str) -> tuple[Desired, Target]:
        """Return a name's desired state, and the version that is served under the name."""
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
        self, current: Desired, served: Target, target: Target, entry: AuditEntry, *, forced: str | None = None
    ) -> VersionChange:
        if target == current.target:
            if served != target:
                raise BusyError(f"the promotion of {target} is already in progress", todo="see `svc status`")
            return VersionChange(target, current.target, None)
        changed = change_desired(self._store, current, target, previous=current.target, forced=forced, entry=entry)
        return VersionChange(target, current.target, changed.generation)
