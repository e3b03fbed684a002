"""`svc backup`, `svc restore`: a home's copy, and a home of it."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from svc.actor import Actor
from svc.errors import IntegrityError, NotFoundError
from svc.invocation import json_option, settings_of

_folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))


class _Bar(ExitStack):
    """Shows how much of the weights was copied."""

    def begin(self, total: int) -> None:
        """Shows it from now on."""
        from svc.terminal import reading

        self.close()
        self._done = 0
        self._show = self.enter_context(reading("copying weights", total)) if total else None

    def add(self, count: int) -> None:
        """More was copied."""
        self._done += count
        if self._show:
            self._show(self._done)


@click.command()
@_folder
@click.option("--keep", default=7, show_default=True, type=click.IntRange(1), help="Snapshots that stay.")
@click.option("--verify", is_flag=True, help="Compare weights that were copied before with their hashes, too.")
@json_option
@click.pass_context
def backup(ctx: click.Context, folder: Path, keep: int, verify: bool, as_json: bool) -> None:
    """Copy the home into DIR as a snapshot, while it is used; weights that are there are not copied again."""
    from svc.backup.archive import Archive
    from svc.backup.backup import Backup
    from svc.store.audit import Action, AuditEntry, record_event
    from svc.store.database import open_database

    settings = settings_of(ctx)
    if not settings.home.is_dir():
        raise NotFoundError(f"there is no home {settings.home}", todo="name it: svc --home FOLDER backup DIR")
    folder = folder.absolute()
    if folder.is_relative_to(settings.home):
        raise click.UsageError("DIR lies in the home: what destroys the one would destroy the other")
    store = open_database(settings.home)
    record_event(store, AuditEntry(Action.BACKUP, str(folder), Actor.local()))
    with _Bar() as bar:
        made = Backup(settings, Archive(folder), verify=verify, on_start=bar.begin, on_bytes=bar.add).run(keep)
    snapshot = made.snapshot
    if as_json:
        from svc.terminal import print_json

        print_json(
            {
                "snapshot": snapshot.name,
                "versions": snapshot.versions,
                "copied": made.copied,
                "left_out": snapshot.left_out,
                "tracking": snapshot.tracking,
                "pruned": made.pruned,
            }
        )
    else:
        click.secho(
            f"snapshot {snapshot.name}: {len(snapshot.versions)} versions, {len(made.copied)} of them copied now",
            fg="green",
        )
    if snapshot.tracking:
        click.echo(f"not in it: MLflow at {snapshot.tracking}, which has curves and aliases: {_ELSEWHERE}", err=True)
    if snapshot.left_out:
        raise IntegrityError(
            "the snapshot can be restored, but not all is in it: "
            + "; ".join(f"{version}: {why}" for version, why in snapshot.left_out.items()),
            todo="restore them from an older snapshot, or remove them: svc models rm",
        )


_ELSEWHERE = "back up its database with its own means, as pg_dump for PostgreSQL, right after this"


@click.command()
@_folder
@click.option("--snapshot", "name", metavar="NAME", help="Which one.  [default: the newest]")
@click.option("--list", "listing", is_flag=True, help="Show which snapshots there are, and restore nothing.")
@json_option
@click.pass_context
def restore(ctx: click.Context, folder: Path, name: str | None, listing: bool, as_json: bool) -> None:
    """Make a home of a snapshot in DIR. The home must be empty; every file is compared with its hash."""
    from svc.backup.archive import Archive
    from svc.backup.restore import Restore
    from svc.store.audit import Action, AuditEntry, record_event
    from svc.store.database import open_database

    archive = Archive(folder.absolute())
    if listing:
        _list([snapshot.model_dump(include=_SHOWN) for snapshot in archive.snapshots()], as_json=as_json)
        return
    settings = settings_of(ctx)
    snapshot = archive.find(name)
    with _Bar() as bar:
        Restore(archive, settings.home, bar.begin, bar.add).run(snapshot)
    record_event(open_database(settings.home), AuditEntry(Action.RESTORE, snapshot.name, Actor.local()))
    if as_json:
        from svc.terminal import print_json

        print_json({**snapshot.model_dump(include=_SHOWN), "home": str(settings.home)})
        return
    click.secho(f"{settings.home} is as of {snapshot.name}: {len(snapshot.versions)} versions", fg="green")
    if snapshot.tracking:
        click.echo(f"restore MLflow at {snapshot.tracking} of the same time, before you serve", err=True)


_SHOWN = {"name", "release", "versions", "tracking", "left_out"}


def _list(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        from svc.terminal import print_json

        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['name']}: {', '.join(row['versions']) or 'no versions'}")
