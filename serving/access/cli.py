"""`svc keys` manages API keys. `svc usage` shows the requests and tokens of each key."""

import csv
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from serving.access.time_options import duration, time_past, time_to_come
from svc.identity.principal import Limits, Scope
from svc.invocation import confirm, json_option, print_json, reason_option, remote_of, settings_of, yes_option

if TYPE_CHECKING:
    from serving.access.keyring import Keyring

_FIGURES = ("requests", "tokens_in", "tokens_out")
_count = click.IntRange(1, 2**31 - 1)


@click.group()
def keys() -> None:
    """Create, list, rotate and revoke keys."""


@keys.command()
@click.option("--name", metavar="TEXT", help="Name of the key.  [default: its id]")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="Scope to grant; can be repeated.  [default: infer and feedback]",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="Model that the key may use; can be repeated.  [default: all models]",
)
@click.option(
    "--expires",
    "expires_at",
    type=time_to_come,
    metavar="TIME",
    help="Expiry: a date (UTC) such as 2026-12-31, or a duration from now such as 90d.  [default: never]",
)
@click.option("--requests-per-minute", type=_count, metavar="N", help="Limit on requests per minute.")
@click.option("--tokens-in-per-minute", type=_count, metavar="N", help="Limit on prompt tokens per minute.")
@click.option("--tokens-out-per-minute", type=_count, metavar="N", help="Limit on answer tokens per minute.")
@click.option("--concurrent", type=_count, metavar="N", help="Limit on concurrent requests.")
@click.option(
    "--tokens-per-day",
    type=click.IntRange(1, 2**62),
    metavar="N",
    help="Limit on prompt plus answer tokens per day, counted from midnight UTC.",
)
@click.option(
    "--weight",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Weight of this key relative to other keys when capacity is scarce.",
)
@reason_option
@json_option
@click.pass_context
def create(
    ctx: click.Context,
    /,
    name: str | None,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
    expires_at: datetime | None,
    weight: int,
    reason: str | None,
    as_json: bool,
    **limits: int | None,
) -> None:
    """Create a key. Its secret is printed to stdout once and cannot be shown again."""
    asked: dict[str, Any] = {
        "scopes": frozenset(map(Scope, scopes)) or frozenset({Scope.INFER, Scope.FEEDBACK}),
        "name": name,
        "models": frozenset(models) or None,
        "limits": Limits(**limits),
        "weight": weight,
        "expires_at": expires_at,
        "reason": reason,
    }
    issued = _change(ctx, "/svc/keys", asked, lambda keyring: keyring.create(**asked).row())
    _print_issued(issued, as_json=as_json)


@keys.command("list")
@click.option("--all", "every", is_flag=True, help="Include revoked keys.")
@json_option
@click.pass_context
def list_keys(ctx: click.Context, every: bool, as_json: bool) -> None:
    """List keys with their scopes and limits. Secrets are not stored and cannot be shown."""
    from svc.terminal import print_table

    rows = [row for row in _rows(ctx) if every or row["revoked_at"] is None]
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("no keys yet; create the first one: svc keys create --scope admin")
        return
    headers = ("key", "name", "state", "scopes", "models", "limits", "expires", "last used")
    print_table(headers, map(_cells, rows))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    limits = [f"{name.replace('_', ' ')} {limit}" for name, limit in row["limits"].items() if limit is not None]
    return (
        row["key_id"],
        row["name"],
        row["state"],
        ", ".join(row["scopes"]),
        "all" if row["models"] is None else ", ".join(row["models"]),
        ", ".join(limits) or "none",
        _minute(row["expires_at"]) or "never",
        _minute(row["last_used"]),
    )


@keys.command()
@click.argument("key")
@click.option(
    "--grace",
    type=duration,
    default="0",
    show_default=True,
    help="How long the old secret stays valid, for example 1h.",
)
@reason_option
@yes_option
@json_option
@click.pass_context
def rotate(ctx: click.Context, key: str, grace: timedelta, reason: str | None, yes: bool, as_json: bool) -> None:
    """Replace the secret of KEY (id or name). The new secret is printed to stdout once."""
    key_id, title = _find(ctx, key)
    if not grace:
        confirm(f"The current secret of {title} will become invalid immediately. Continue?", yes=yes, as_json=as_json)
    asked = {"key": key_id, "grace_s": grace.total_seconds(), "reason": reason}
    issued = _change(
        ctx, "/svc/keys/rotate", asked, lambda keyring: keyring.rotate(key_id, grace=grace, reason=reason).row()
    )
    _print_issued(issued, as_json=as_json)


@keys.command()
@click.argument("key")
@reason_option
@yes_option
@json_option
@click.pass_context
def revoke(ctx: click.Context, key: str, reason: str | None, yes: bool, as_json: bool) -> None:
    """Permanently revoke KEY (id or name). Running servers reject it within a second."""
    from serving.access.keyring import key_row

    key_id, title = _find(ctx, key)
    confirm(f"{title} will be revoked permanently. Continue?", yes=yes, as_json=as_json)
    asked = {"key": key_id, "reason": reason}
    revoked = _change(ctx, "/svc/keys/revoke", asked, lambda keyring: key_row(keyring.revoke(key_id, reason=reason)))
    if as_json:
        print_json(revoked)
    else:
        click.echo(f"{title} has been revoked")


@click.command()
@click.option(
    "--since",
    type=time_past,
    metavar="TIME",
    default="30d",
    show_default=True,
    help="Start of the period: a date (UTC), or an age such as 30d; rounded down to the hour.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print the table as CSV.")
@json_option
@click.pass_context
def usage(ctx: click.Context, since: datetime, as_csv: bool, as_json: bool) -> None:
    """Show the number of requests and tokens by key and model."""
    if as_csv and as_json:
        raise click.UsageError("--csv and --json cannot be combined")
    from serving.access.usage import usage_since
    from svc.store.database import open_store
    from svc.store.keys import read_keys

    store = open_store(settings_of(ctx))
    names = {key.id: key.principal.name for key in read_keys(store)}
    rows = [
        {"key_id": total.key_id or None, "name": names.get(total.key_id), "model": total.model, **total.usage._asdict()}
        for total in usage_since(store, since)
    ]
    if as_csv:
        writer = csv.DictWriter(sys.stdout, ["key_id", "name", "model", *_FIGURES])
        writer.writeheader()
        writer.writerows(rows)
        return
    from rich.table import Column

    from svc.terminal import print_table

    if as_json:
        print_json(rows)
    elif not rows:
        click.echo(f"no usage since {since.isoformat(timespec='minutes')}")
    else:
        total = {
            "key_id": "all",
            "name": "",
            "model": "",
            **{name: sum(row[name] for row in rows) for name in _FIGURES},
        }
        figures = [Column(name.replace("_", " "), justify="right") for name in _FIGURES]
        print_table(
            ["key", "name", "model", *figures],
            [
                (row["key_id"] or "none", row["name"], row["model"], *(f"{row[name]:,}" for name in _FIGURES))
                for row in [*rows, total]
            ],
        )


def _rows(ctx: click.Context) -> list[dict[str, Any]]:
    """Return all keys as JSON, read from the server given by `svc --server` or else from the home folder."""
    if remote := remote_of(ctx):
        from svc.remote.remote_server import RemoteServer

        return list(RemoteServer(remote).get("/svc/keys")["keys"])
    return _keyring(ctx).rows()


def _find(ctx: click.Context, text: str) -> tuple[str, str]:
    """Return the id and display title of the key with the given id or, if there is none, the given name.

    Raises:
        NotFoundError: no key has this id or name.
    """
    from svc.store.keys import no_such_key

    for row in sorted(_rows(ctx), key=lambda row: bool(row["key_id"] != text)):  # an id takes precedence over a name
        if row["key_id"] == text or (row["name"] == text and row["revoked_at"] is None):
            return row["key_id"], f"{row['name']} ({row['key_id']})"
    raise no_such_key(text)


def _change(
    ctx: click.Context, path: str, asked: dict[str, Any], change: Callable[["Keyring"], dict[str, Any]]
) -> dict[str, Any]:
    """Change a key on the server given by `svc --server`, or else in the home folder. Return the key as JSON.

    Args:
        path: path of the request in the server's API.
        asked: body of the request.
        change: function that makes the same change in the home folder.
    """
    if remote := remote_of(ctx):
        from pydantic_core import to_jsonable_python

        from svc.remote.remote_server import RemoteServer

        return RemoteServer(remote).post(path, to_jsonable_python(asked))
    return change(_keyring(ctx))


def _keyring(ctx: click.Context) -> "Keyring":
    from serving.access.keyring import Keyring
    from svc.identity.actor import Actor
    from svc.store.database import open_store

    return Keyring(open_store(settings_of(ctx)), Actor.local())


def _print_issued(issued: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(issued)
        return
    if issued["old_secret_until"]:
        click.echo(f"the old secret stays valid until {issued['old_secret_until']}", err=True)
    click.echo(f"key {issued['key_id']}; its secret is shown only once:", err=True)
    click.echo(issued["secret"])


def _minute(text: str | None) -> str:
    return text[:16].replace("T", " ") if text else ""
