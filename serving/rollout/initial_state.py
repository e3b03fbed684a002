"""Which models and versions a server starts with, and which may be served at all."""

from collections.abc import Sequence

from sqlalchemy import Engine as Store

from svc.errors import NotFoundError, RefusedError
from svc.identity.actor import Actor
from svc.registry.adapter import read_adapter
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.store.audit import Action, AuditEntry
from svc.store.deployments import deployed_names, set_deployments
from svc.store.desired import Desired, change_desired, desired_names, read_desired
from svc.version import Format, Target, VersionId

_PREFERRED = (Format.GPTQ, Format.MERGED)


def choose_deployments(
    registry: Registry, store: Store, models: Sequence[str], format: Format | None, *, every: bool = False
) -> list[Desired]:
    """What a server starts with, one desired state for each model; the store knows the set from then on.

    Args:
        models: see `choose_desired`; none: those that were served last, or the only one that there is.
        format: of all that are named.
        every: every model that was ever served.

    Raises:
        NotFoundError, RefusedError: see `choose_desired`; also for several names and none given, and for one twice.
    """
    named = list(models) or (desired_names(store) if every else deployed_names(store))
    found = [choose_desired(registry, store, model, format) for model in named or [_only_name(registry, store)]]
    names = [desired.name for desired in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RefusedError(
            f"{', '.join(twice)} is named twice",
            expected="one version of each model",
            todo="serve one of them; `svc promote` brings another",
        )
    set_deployments(store, names)
    return found


def choose_desired(registry: Registry, store: Store, model: str, format: Format | None) -> Desired:
    """The desired state to start from, written to the store and into the audit log where it is new.

    Only a person on this machine chooses it.

    Args:
        model: NAME, NAME@N or NAME@alias.
        format: None for what served last, else GPTQ where the version has it.

    Raises:
        NotFoundError: no such model, version or format.
        RefusedError: a version that failed a check when it was registered, or an adapter that vLLM cannot apply.
    """
    seen = read_desired(store, model.partition("@")[0])
    version = seen.target.version if seen and "@" not in model else _resolve(registry, model)
    if format is None and seen and seen.target.version == version:
        format = seen.target.format
    target = Target(version, format or _best_format(registry, version))
    require_servable(registry, target)
    if seen and seen.target == target:
        return seen
    require_promotable(registry.manifest(version))
    entry = AuditEntry(Action.SERVE, str(version), Actor.local())
    return change_desired(store, seen, target, previous=seen.target if seen else None, entry=entry)


def require_servable(registry: Registry, target: Target) -> None:
    """Raises where a version cannot be served in a format.

    Raises:
        NotFoundError: no such version or format, or the base of its adapter is gone.
        RefusedError: vLLM cannot apply its adapter beside its base.
    """
    registry.format(target.version, target.format)
    if target.format is Format.ADAPTER:
        read_adapter(registry, target.version)


def require_promotable(manifest: Manifest) -> None:
    """Raises where a version was registered though it failed a check.

    Raises:
        RefusedError: with what it failed.
    """
    if manifest.failed:
        raise RefusedError(
            f"{manifest.id} failed a check when it was registered: {'; '.join(manifest.failed)}",
            expected="a version that passed every check",
            todo=f"mend what the check names and train again, or: svc promote {manifest.id} --force --reason TEXT",
        )


def _resolve(registry: Registry, model: str) -> VersionId:
    """What the registry says, but of a bare name the newest version that passed every check, if any did."""
    version = registry.resolve(model)
    if "@" in model or not registry.manifest(version).failed:
        return version
    passed = (known for known in reversed(registry.versions(model)) if not registry.manifest(known).failed)
    return next(passed, version)


def _only_name(registry: Registry, store: Store) -> str:
    names = desired_names(store) or registry.names()
    if len(names) != 1:
        known = ", ".join(names) or "none: `svc train RECIPE` makes one"
        raise NotFoundError("no model was named", expected=f"svc serve NAME..., of: {known}; or --all")
    return names[0]


def _best_format(registry: Registry, version: VersionId) -> Format:
    formats = registry.manifest(version).formats
    for format in _PREFERRED:
        if format in formats:
            return format
    raise NotFoundError(
        f"{version} has no format that can be served by itself",
        expected=f"{' or '.join(_PREFERRED)}, it has {', '.join(formats)}",
        todo=f"serve it beside its base: --format {Format.ADAPTER}" if Format.ADAPTER in formats else "",
    )
