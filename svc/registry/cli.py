"""`svc models`, `svc show` and `svc ui` show the registry; `svc models rm` and `svc gc` free disk space."""

import sys
from functools import partial

import click

from svc.errors import BusyError, NotFoundError
from svc.identity.actor import Actor
from svc.invocation import json_option, print_json, reason_option, settings_of
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.version import Alias, VersionId


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List all versions with their aliases and metrics."""
    if ctx.invoked_subcommand is not None:
        return
    from svc.terminal import print_table

    registry = Registry.of(settings_of(ctx))
    registry.refresh()
    manifests = [registry.manifest(version) for version in registry.versions()]
    aliases: dict[str, dict[Alias, VersionId]] = {}
    with registry.tracking.if_available():
        aliases = {name: registry.tracking.aliases(name) for name in {manifest.name for manifest in manifests}}
    rows = [
        _row(manifest, [a for a, v in aliases.get(manifest.name, {}).items() if v == manifest.id])
        for manifest in manifests
    ]
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("no versions yet; create one: svc train RECIPE")
        return
    shown = ("version", "aliases", "created", "base", "formats", "checks", "quality")
    print_table(shown, ([row[column] for column in shown] for row in rows))


@models.command()
@click.argument("versions", nargs=-1, required=True, metavar="NAME@N...")
@reason_option
@json_option
@click.pass_context
def rm(ctx: click.Context, versions: tuple[str, ...], reason: str | None, as_json: bool) -> None:
    """Remove versions that are not needed by any alias, server or rollback."""
    from svc.registry.housekeeping import remove_version
    from svc.store.audit import Action, AuditEntry, record_event
    from svc.store.database import open_store

    settings = settings_of(ctx)
    registry, store = Registry.of(settings), open_store(settings)
    parsed = [VersionId.parse(text) for text in versions]
    removed = []
    for version in parsed:
        size = remove_version(registry, store, version)
        record_event(store, AuditEntry(Action.REMOVE_VERSION, str(version), Actor.local(), reason, {"bytes": size}))
        removed.append({"version": str(version), "bytes": size})
        if not as_json:
            click.echo(f"removed {version}: {size / 1e6:.0f} MB")
    if as_json:
        print_json(removed)


@models.command()
@click.argument("versions", nargs=-1, required=True, metavar="NAME@N...")
@click.pass_context
def push(ctx: click.Context, versions: tuple[str, ...]) -> None:
    """Upload versions to the object store (artifacts.url). Files that are already there are not sent again.

    New versions are uploaded when they are registered.
    """
    registry = Registry.of(settings_of(ctx))
    for version in [VersionId.parse(text) for text in versions]:
        registry.push(version)
        click.echo(f"{version} is in the object store")


@click.command()
@click.option(
    "--older-than",
    default=14.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Delete only files that have not changed for this many days.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be deleted without deleting it.")
@reason_option
@json_option
@click.pass_context
def gc(ctx: click.Context, older_than: float, dry_run: bool, reason: str | None, as_json: bool) -> None:
    """Delete old files of runs, sweeps, jobs, batches and interrupted work, and old logs and caches.

    No version is deleted.

    With an object store, weights that are also stored there are removed until the versions take up at most
    artifacts.cache_gb.
    """
    from svc.registry.housekeeping import evict, find_ended, find_evictable, find_reclaimable, reclaim
    from svc.store.audit import Action, AuditEntry, record_event
    from svc.store.database import open_store

    settings = settings_of(ctx)
    registry, store = Registry.of(settings), open_store(settings)
    reclaimed, failed = [], 0
    found = [
        *find_reclaimable(registry, settings.home, older_than),
        *find_ended(store, settings.home, older_than),
    ]
    steps = [(item, partial(reclaim, item)) for item in found]
    if settings.artifacts.cache_gb is not None:
        evictable = find_evictable(registry, store, settings.artifacts.cache_gb * 1e9)
        steps += [(item, partial(evict, registry, store, item)) for item in evictable]
    for item, remove in steps:
        try:
            if not dry_run:
                remove()
                details = {"bytes": item.size, "why": item.why}
                record_event(store, AuditEntry(Action.COLLECT, str(item.path), Actor.local(), reason, details))
        except (BusyError, OSError) as error:
            failed += 1
            click.echo(f"could not delete {item.path}: {error}", err=True)
            continue
        reclaimed.append(item)
        if not as_json:
            click.echo(f"{item.path}: {item.size / 1e6:.0f} MB, {item.why}")
    if as_json:
        print_json([{"path": str(item.path), "bytes": item.size, "why": item.why} for item in reclaimed])
    else:
        total = f"{sum(item.size for item in reclaimed) / 1e6:.0f} MB"
        click.echo(f"{total} would be freed; nothing was deleted" if dry_run else f"{total} freed")
    ctx.exit(1 if failed else 0)


def _row(manifest: Manifest, aliases: list[str]) -> dict[str, str]:
    reports = [record.evaluation for record in manifest.formats.values() if record.evaluation]
    primary = " / ".join(f"{report.figures[report.primary].estimate.value:.3f}" for report in reports)
    return {
        "version": str(manifest.id),
        "aliases": ", ".join(aliases),
        "created": manifest.created_at.isoformat(timespec="seconds"),
        "base": manifest.base.origin,
        "formats": ", ".join(manifest.formats),
        "checks": "failed" if manifest.failed else "undecided" if manifest.undecided else "passed",
        "quality": f"{manifest.primary_title} {primary}".strip(),
        "exact_match": " / ".join(f"{report.exact_match.value:.3f}" for report in reports),
    }


@click.command()
@click.argument("version")
@click.option("--parity", is_flag=True, help="Show the parity report, which compares the trained and the served model.")
@json_option
@click.pass_context
def show(ctx: click.Context, version: str, parity: bool, as_json: bool) -> None:
    """Show one version, given as NAME, NAME@N or NAME@alias."""
    registry = Registry.of(settings_of(ctx))
    manifest = registry.manifest(registry.resolve(version))
    if parity:
        _show_parity(registry, manifest, as_json=as_json)
        return
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    from svc.registry.render import print_version

    print_version(manifest, registry.folder(manifest.id))


def _show_parity(registry: Registry, manifest: Manifest, *, as_json: bool) -> None:
    if manifest.parity is None:
        raise NotFoundError(
            f"{manifest.id} has no parity report",
            expected="a version that has a complete model, not only an adapter",
            todo="train it again, for example with `formats: [merged]`",
        )
    if as_json:
        print_json(manifest.parity.model_dump(mode="json"))
        return
    from svc.registry.parity_page import PARITY_PAGE
    from svc.registry.render import print_parity

    print_parity(manifest.parity, registry.reference(manifest.id, PARITY_PAGE))


@click.command()
@click.option("--port", default=5000, show_default=True, help="Port of MLflow's web UI on 127.0.0.1.")
@click.pass_context
def ui(ctx: click.Context, port: int) -> None:
    """Start the MLflow web UI on this machine. Press Ctrl-C to stop it."""
    import os
    import socket

    registry = Registry.of(settings_of(ctx))
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise BusyError(f"port {port} is in use", todo=f"choose another port: svc ui --port {port + 1}")
    click.echo(f"http://127.0.0.1:{port}", err=True)
    arguments = ["--backend-store-uri", registry.tracking.uri, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *arguments])  # noqa: S606 - no shell is wanted
