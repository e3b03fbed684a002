"""`svc backup` backs up a home folder, and `svc restore` creates one from a backup."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svc.errors import IntegrityError, NotFoundError, RefusedError
from svc.identity.actor import Actor
from svc.invocation import json_option, print_json, settings_of, yes_option

if TYPE_CHECKING:
    from serving.backup.restored_keys import RestoredKeys

_SHOWN = {"name", "release", "versions", "tracking", "store", "left_out"}
_ELSEWHERE = "back up its database with the database's own tools, such as pg_dump for PostgreSQL, right after this"
_folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))


@click.command()
@_folder
@click.option(
    "--keep",
    default=7,
    show_default=True,
    type=click.IntRange(1),
    help="Number of snapshots to keep; older snapshots are deleted.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Check the weights in earlier backups against their hashes, and copy damaged files again.",
)
@json_option
@click.pass_context
def backup(ctx: click.Context, folder: Path, keep: int, verify: bool, as_json: bool) -> None:
    """Copy the home folder to DIR as a snapshot, even if it is in use. Weights already in DIR are not copied again."""
    from serving.backup.archive import Archive
    from serving.backup.backup import Backup
    from svc.store.audit import Action, AuditEntry, record_event
    from svc.store.database import open_store

    settings = settings_of(ctx)
    if not settings.home.is_dir():
        raise NotFoundError(
            f"the home folder {settings.home} does not exist",
            todo="specify an existing home folder: svc --home FOLDER backup DIR",
        )
    folder = folder.absolute()
    if folder.is_relative_to(settings.home):
        raise click.UsageError(
            "DIR must be outside the home folder: damage to the home folder would destroy the backup too"
        )
    store = open_store(settings)
    record_event(store, AuditEntry(Action.BACKUP, str(folder), Actor.local()))
    made = Backup(settings, Archive(folder), verify, _progress).run(keep)
    snapshot = made.snapshot
    if as_json:
        told = snapshot.model_dump(include={"versions", "left_out", "tracking", "store"})
        print_json({"snapshot": snapshot.name, "copied": made.copied, "pruned": made.pruned, **told})
    else:
        click.secho(
            f"snapshot {snapshot.name} (versions: {len(snapshot.versions)}, newly copied: {len(made.copied)})",
            fg="green",
        )
    if snapshot.tracking:
        click.echo(
            f"not included: MLflow at {snapshot.tracking}, which holds training curves and version aliases; "
            f"{_ELSEWHERE}",
            err=True,
        )
    if snapshot.store:
        click.echo(
            f"not included: the store at {snapshot.store}, which holds keys, desired versions and the audit log; "
            "dump it with pg_dump right before each backup",
            err=True,
        )
    if snapshot.left_out:
        raise IntegrityError(
            "the snapshot can be restored but is incomplete: "
            + "; ".join(f"{version}: {why}" for version, why in snapshot.left_out.items()),
            todo="restore these versions and clients' files from an older snapshot, or remove them: svc models rm, or "
            "DELETE /v1/files/ID",
        )


@click.command()
@_folder
@click.option("--snapshot", "name", metavar="NAME", help="Snapshot to restore.  [default: the newest]")
@click.option("--list", "listing", is_flag=True, help="List the snapshots without restoring any of them.")
@click.option(
    "--revoke-keys", is_flag=True, help="Revoke all keys in the snapshot, so that only keys created later are valid."
)
@yes_option
@json_option
@click.pass_context
def restore(
    ctx: click.Context, folder: Path, name: str | None, listing: bool, revoke_keys: bool, yes: bool, as_json: bool
) -> None:
    """Create a home from a snapshot in DIR. The home must be empty; every file is checked against its hash.

    API keys are restored too, but a key that is revoked in a newer snapshot in DIR stays revoked.
    The keys that will be valid are listed and must be confirmed.
    """
    from serving.backup.archive import STORE_FILE, Archive
    from serving.backup.restore import restore_home
    from svc.store.audit import Action, AuditEntry, record_event
    from svc.store.database import open_database

    archive = Archive(folder.absolute())
    if listing:
        snapshots = archive.snapshots()
        if as_json:
            print_json([each.model_dump(include=_SHOWN) for each in snapshots])
        else:
            for each in snapshots:
                click.echo(f"{each.name}: {', '.join(each.versions) or 'no versions'}")
        return
    settings = settings_of(ctx)
    snapshot = archive.find(name)
    unused = snapshot.store is None and settings.store.url is not None
    if unused and revoke_keys:
        raise RefusedError(
            f"the keys of snapshot {snapshot.name} would not be used, because store.url names another store",
            todo="restore without --revoke-keys, or remove store.url from the settings",
        )
    keys: dict[str, Any] = {}

    def confirm_keys(found: "RestoredKeys") -> None:
        keys.update(_key_rows(found))
        _show_keys(keys)
        if found.valid and not yes:
            _confirm_keys(found, asks=not as_json and sys.stdin.isatty())

    restore_home(archive, snapshot, settings.home, progress=_progress, revoke_keys=revoke_keys, on_keys=confirm_keys)
    if snapshot.store is None:
        record_event(open_database(settings.home), AuditEntry(Action.RESTORE, snapshot.name, Actor.local()))
    if unused:
        click.echo(
            f"the restored {settings.home / STORE_FILE}, with the snapshot's keys, desired versions and requests, is "
            "not used, because store.url is set; to use this file, remove store.url; if you do not need it, delete it",
            err=True,
        )
    if as_json:
        print_json({**snapshot.model_dump(include=_SHOWN), "home": str(settings.home), "keys": keys})
        return
    click.secho(f"restored {settings.home} from {snapshot.name}: {len(snapshot.versions)} versions", fg="green")
    if snapshot.store:
        click.echo(
            f"before you run svc serve, restore the store at {snapshot.store} from its own backup with pg_restore, and "
            "set store.url to the restored database; keys that were revoked after that backup will be valid again",
            err=True,
        )
    if snapshot.tracking:
        click.echo(
            f"before you run svc serve, restore MLflow at {snapshot.tracking} to its state at the time of the snapshot",
            err=True,
        )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    from svc.terminal import reading

    done = 0
    with reading("copying files", total) as show:

        def add(count: int) -> None:
            nonlocal done
            done += count
            show(done)

        yield add


def _key_rows(keys: "RestoredKeys") -> dict[str, Any]:
    from serving.access.keyring import iso_seconds, key_row

    return {
        "valid": [
            {
                **key_row(key),
                "last_used": iso_seconds(keys.last_used.get(key.id)),
                "rotated_later": key.id in keys.rotated,
            }
            for key in keys.valid
        ],
        "revoked": [{**key_row(key), "revoked_in": source or None} for key, source in keys.revoked],
        "unread_snapshots": keys.unread,
    }


def _show_keys(keys: dict[str, Any]) -> None:
    """List the revoked and valid keys on stderr, so that they are not part of piped output."""
    from svc.terminal import console, print_table

    for name in keys["unread_snapshots"]:
        click.echo(f"could not read the store of the newer snapshot {name}; keys revoked in it are unknown", err=True)
    for row in keys["revoked"]:
        source = row["revoked_in"]
        why = f"it is revoked in the newer snapshot {source}" if source else "--revoke-keys was given"
        click.echo(f"revoked key {row['name']} ({row['key_id']}): {why}", err=True)
    if keys["valid"]:
        click.echo("these keys will be valid:", err=True)
        print_table(("key", "name", "scopes", "last used", ""), map(_cells, keys["valid"]), to=console)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    rotated = "its secret was rotated later; the old secret will be valid again" if row["rotated_later"] else ""
    used = (row["last_used"] or "")[:16].replace("T", " ")
    return row["key_id"], row["name"], ", ".join(row["scopes"]), used, rotated


def _confirm_keys(keys: "RestoredKeys", *, asks: bool) -> None:
    if asks:
        click.confirm(
            "Keys that were revoked after the newest snapshot will be valid again. Continue?", abort=True, err=True
        )
        return
    names = ", ".join(f"{key.principal.name} ({key.id})" for key in keys.valid)
    raise RefusedError(
        f"the restore needs confirmation, because these keys would be valid afterwards: {names}",
        todo="add --yes to accept all of these keys, or --revoke-keys to revoke them",
    )
