"""Which version a model shall serve from now on: what may be wished for, and how the wish is written.

Whether it was carried out, the journal of swaps says.
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
    """What was wished for.

    Attributes:
        before: what was wanted until then.
        generation: of the desired state that has it; None where the target serves already.
        undecided: gates of the version for which its examples were too few, each as a sentence.
    """

    target: Target
    before: Target
    generation: int | None
    undecided: tuple[str, ...] = ()


class VersionChanges:
    """Writes what is wished for.

    Args:
        served: what the server serves under each name, until it has come to what is desired.
    """

    def __init__(self, registry: Registry, store: Store, served: Callable[[], Mapping[str, Target]]) -> None:
        self._registry = registry
        self._store = store
        self._served = served

    def promote(
        self, version: VersionId, format: Format | None, *, force: bool, reason: str | None, actor: Actor
    ) -> VersionChange:
        """Wishes for a version.

        Args:
            format: None for that of what serves now.
            force: though it failed a check when it was registered; `reason` says why.

        Raises:
            NotFoundError: no such version or format, or the name is not served.
            RefusedError: it cannot be served, or failed a check.
            BusyError: it is on its way, or somebody else changed what is desired at the same moment.
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
        """Wishes for the version of before; while another is on its way, for the one that serves.

        Raises:
            NotFoundError: the name is not served, or served no version before.
            BusyError: somebody else changed what is desired at the same moment.
        """
        current, served = self._current(name)
        # While another version is on its way, the one that serves stays: what was wanted before may never have served.
        target = served if served != current.target else current.previous
        if target is None:
            raise NotFoundError(
                f"{name} served no version before {current.target}", todo="promote one: svc promote NAME@N"
            )
        entry = AuditEntry(Action.ROLLBACK, str(target.version), actor, reason)
        return self._change(current, served, target, entry)

    def _current(self, name: str) -> tuple[Desired, Target]:
        """What a name shall serve, and what it serves."""
        served = self._served()
        desired = read_desired(self._store, name) if name in served else None
        if desired is None:
            raise NotFoundError(
                f"{name!r} is not served",
                expected=f"what the server serves: {', '.join(served) or 'nothing'}",
                todo=f"svc add {name}",
            )
        return desired, served[name]

    def _change(
        self, current: Desired, served: Target, target: Target, entry: AuditEntry, *, forced: str | None = None
    ) -> VersionChange:
        if target == current.target:
            if served != target:
                raise BusyError(f"{target} is on its way already", todo="see `svc status`")
            return VersionChange(target, current.target, None)
        changed = change_desired(self._store, current, target, previous=current.target, forced=forced, entry=entry)
        return VersionChange(target, current.target, changed.generation)
