"""Changes the desired version of a model: checks which versions are allowed, and writes the change.

The journal of swaps shows whether it was carried out.
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
    """A change of the desired version.

    Attributes:
        before: the desired version until now.
        generation: generation of the new desired state; None if the target serves already.
        undecided: gates of the version for which it had too few examples, each as a sentence.
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
            format: None for the format that serves now.
            force: promote it even if it failed a check at its registration; `reason` says why.

        Raises:
            NotFoundError: no such version or format, or the name is not served.
            RefusedError: the version cannot be served, or failed a check.
            BusyError: its promotion is in progress, or the desired version was changed concurrently.
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
        """Make the previous version the desired one, or during a promotion the one that serves.

        Raises:
            NotFoundError: the name is not served, or served no version before.
            BusyError: the desired version was changed concurrently.
        """
        current, served = self._current(name)
        # During a promotion the version that serves stays: the previously desired one may never have served.
        target = served if served != current.target else current.previous
        if target is None:
            raise NotFoundError(
                f"{name} has served no version before {current.target}", todo=f"promote one: svc promote {name}@N"
            )
        entry = AuditEntry(Action.ROLLBACK, str(target.version), actor, reason)
        return self._change(current, served, target, entry)

    def _current(self, name: str) -> tuple[Desired, Target]:
        """Return the desired state of a name, and the version that it serves."""
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
