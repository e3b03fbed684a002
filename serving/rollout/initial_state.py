"""Chooses the models and versions that a server serves when it starts, and checks whether versions may be served."""

from collections.abc import Sequence
from contextlib import suppress

from sqlalchemy import Engine as Store

from svc.errors import IntegrityError, NotFoundError, RefusedError
from svc.identity.actor import Actor
from svc.registry.adapter import read_adapter
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.store.audit import Action, AuditEntry
from svc.store.deployments import deployed_names, set_deployments
from svc.store.desired import Desired, change_desired, desired_names, read_desired
from svc.store.leases import LEASE_S, running_servers
from svc.version import SERVED_FORMATS, Format, Target, VersionId


def choose_deployments(
    registry: Registry,
    store: Store,
    models: Sequence[str],
    format: Format | None,
    *,
    every: bool = False,
    needed: bool = True,
) -> list[Desired]:
    """Return the initial desired state of each model to be served, and store the set of models.

    All servers that share a store serve the same versions of the same models. A server that starts while other servers
    are running changes neither the set of models nor their versions.

    Args:
        models: models as passed to `choose_desired`. If empty, the models that were served last are used, or
            else the only registered model.
        format: format in which all named models are served.
        every: whether to choose every model that has ever been served, if `models` is empty.
        needed: whether at least one model is required.

    Raises:
        NotFoundError, RefusedError: see `choose_desired`. Also raised if no model is given and the choice is not
            unique, if a model is given more than once, or if other running servers serve other models or versions.
    """
    others = list(running_servers(store).values())
    chosen = list(models) or (desired_names(store) if every else deployed_names(store))
    if not chosen and needed:
        chosen = [_only_name(registry, store)]
    names = [_name(model) for model in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RefusedError(
            f"these models were given more than once: {', '.join(twice)}",
            expected="at most one version of each model",
            todo="give each model once; switch to another version with `svc promote`",
        )
    if others:
        _require_same_models(names, deployed_names(store), others)
    states = [choose_desired(registry, store, model, format, fixed=bool(others)) for model in chosen]
    if not others:
        set_deployments(store, names)
    return states


def _require_same_models(names: Sequence[str], served: Sequence[str], others: Sequence[str]) -> None:
    if set(names) == set(served):
        return
    raise RefusedError(
        f"this server would serve {', '.join(names)}, but the running servers that use this store "
        f"({', '.join(others)}) "
        f"serve {', '.join(served) or 'no model'}",
        expected=f"the same models on all servers; a killed server still counts as running for {LEASE_S:.0f} seconds",
        todo="start the server without model names: svc serve; then change the models of all servers with svc add "
        "and svc remove",
    )


def choose_desired(
    registry: Registry, store: Store, model: str, format: Format | None, *, fixed: bool = False
) -> Desired:
    """Return a model's initial desired state. If it differs from the stored state, first store it and record the choice
    in the audit log.

    The audit log attributes the choice to the local user, because only commands on this machine call this
    function.

    Args:
        model: NAME, NAME@N or NAME@alias.
        format: the format to serve. None selects the format that was served last, or else the
            first of `SERVED_FORMATS` that the version has.
        fixed: whether the desired state must not change, because other servers follow it.

    Raises:
        NotFoundError: there is no such model, version or format.
        RefusedError: the version failed a check at registration, vLLM cannot serve the format or apply the adapter, or
            `fixed` is set and the stored state differs.
    """
    stored = read_desired(store, _name(model))
    version = stored.target.version if stored and "@" not in model else _resolve(registry, model)
    if format is None and stored and stored.target.version == version:
        format = stored.target.format
    target = Target(version, format or best_format(registry, version))
    require_servable(registry, target)
    if stored and stored.target == target:
        return stored
    if fixed and stored:
        raise RefusedError(
            f"{target} was requested, but the running servers that use this store serve {stored.target}",
            expected=f"{stored.name}, or no model",
            todo=f"start the server without a version, then switch all servers: svc promote {target.version}",
        )
    require_promotable(registry.manifest(version))
    entry = AuditEntry(Action.SERVE, str(version), Actor.local())
    return change_desired(store, stored, target, previous=stored.target if stored else None, entry=entry)


def require_servable(registry: Registry, target: Target) -> None:
    """Check that a version can be served in the given format.

    Raises:
        NotFoundError: there is no such version or format, or its adapter's base is missing.
        RefusedError: vLLM cannot serve the format, or cannot apply the version's adapter to its base.
    """
    registry.format(target.version, target.format)
    if target.format is Format.GGUF:
        raise RefusedError(
            f"{target} cannot be served by vLLM",
            expected=f"one of {', '.join(SERVED_FORMATS)}",
            todo="run the file with llama.cpp or Ollama, or choose another format with --format",
        )
    if target.format is Format.ADAPTER:
        read_adapter(registry, target.version)


def servable_targets(registry: Registry, version: VersionId) -> list[Target]:
    """Return one target for each format in which a version can be served. The adapter format comes first, because other
    adapters of the same base can share its engine. The list is empty if the version does not exist.
    """
    targets = list[Target]()
    for format in (Format.ADAPTER, *SERVED_FORMATS):
        with suppress(NotFoundError, RefusedError, IntegrityError):
            require_servable(registry, Target(version, format))
            targets.append(Target(version, format))
    return targets


def require_promotable(manifest: Manifest) -> None:
    """Check that a version did not fail any check when it was registered.

    Raises:
        RefusedError: the version failed a check. The message lists all failed checks.
    """
    if manifest.failed:
        raise RefusedError(
            f"{manifest.id} failed a check at registration: {'; '.join(manifest.failed)}",
            expected="a version that passed every check",
            todo=f"fix the cause and train again, or force the promotion: svc promote {manifest.id} --force --reason "
            "TEXT",
        )


def _resolve(registry: Registry, model: str) -> VersionId:
    """Resolve a model name in the registry to a version.

    `NAME` alone means the newest version that passed every check, or the newest version if none did.
    """
    version = registry.resolve(model)
    if "@" in model or not registry.manifest(version).failed:
        return version
    passed = (known for known in reversed(registry.versions(model)) if not registry.manifest(known).failed)
    return next(passed, version)


def _name(model: str) -> str:
    """Return the NAME part of NAME, NAME@N or NAME@alias."""
    return model.partition("@")[0]


def _only_name(registry: Registry, store: Store) -> str:
    names = desired_names(store) or registry.names()
    if len(names) != 1:
        known = f"`svc serve NAME...` with names from: {', '.join(names)}; or `svc serve --all`"
        first = "a registered model; there is none yet: create one with `svc train RECIPE`"
        raise NotFoundError("no model was given", expected=known if names else first)
    return names[0]


def best_format(registry: Registry, version: VersionId) -> Format:
    """Return the format in which a server serves a version by default.

    Raises:
        NotFoundError: the version has no format that can be served without a base.
    """
    formats = registry.manifest(version).formats
    for format in SERVED_FORMATS:
        if format in formats:
            return format
    raise NotFoundError(
        f"{version} has no format that can be served without a base",
        expected=f"{' or '.join(SERVED_FORMATS)}; the version has {', '.join(formats)}",
        todo=f"serve it as an adapter of its base: --format {Format.ADAPTER}" if Format.ADAPTER in formats else "",
    )
