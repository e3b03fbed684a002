"""`svc keys`: who may use the service. `svc usage`: how much of it was used."""

import csv
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from svc.invocation import confirm, json_option, reason_option, remote_of, settings_of, yes_option
from svc.principal import Limits, Scope
from svc.time_options import duration, time_past, time_to_come

if TYPE_CHECKING:
    from svc.access.keyring import IssuedKey, Keyring
    from svc.access.remote_keyring import RemoteKeyring

_count = click.IntRange(1, 2**31 - 1)
_LIMITS = (
    click.option("--requests-per-minute", type=_count, metavar="N", help="Requests a minute."),
    click.option("--tokens-in-per-minute", type=_count, metavar="N", help="Tokens of prompts a minute."),
    click.option("--tokens-out-per-minute", type=_count, metavar="N", help="Tokens of answers a minute."),
    click.option("--concurrent", type=_count, metavar="N", help="Requests at once."),
    click.option("--tokens-per-day", type=click.IntRange(1, 2**62), metavar="N", help="All tokens of a day, in UTC."),
)


def _limit_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_LIMITS):
        command = option(command)
    return command


@click.group()
def keys() -> None:
    """Make, list, rotate and revoke keys."""


@keys.command()
@click.option("--name", metavar="TEXT", help="What people call it.  [default: its id]")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="What it may be used for; may be given more than once.  [default: infer and feedback]",
)
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="A model that it may ask; may be given more than once."
)
@click.option(
    "--expires", "expires_at", type=time_to_come, metavar="TIME", help="When it ends, as 90d or 2026-12-31, in UTC."
)
@_limit_options
@click.option(
    "--weight",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Its share beside other keys where there is not enough for all.",
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
    """Make a key. Its secret is printed to stdout, this once."""
    issued = _keyring(ctx).create(
        frozenset(Scope(scope) for scope in scopes) or frozenset({Scope.INFER, Scope.FEEDBACK}),
        name=name,
        models=frozenset(models) or None,
        limits=Limits(**limits),
        weight=weight,
        expires_at=expires_at,
        reason=reason,
    )
    _print_issued(issued, as_json=as_json)


@keys.command("list")
@click.option("--all", "every", is_flag=True, help="Revoked keys too.")
@json_option
@click.pass_context
def list_keys(ctx: click.Context, every: bool, as_json: bool) -> None:
    """List keys with their scopes and limits; secrets are not kept, and cannot be shown."""
    from svc.access.key_row import iso_seconds, key_row

    keyring = _keyring(ctx)
    found, used = [key for key in keyring.all() if every or key.revoked_at is None], keyring.last_used()
    rows = [{**key_row(key), "last_used": iso_seconds(used.get(key.id))} for key in found]
    if as_json:
        from svc.terminal import print_json

        print_json(rows)
        return
    if not rows:
        click.echo("no keys yet: `svc keys create --scope admin` makes the first")
        return
    from rich.markup import escape
    from rich.table import Table

    from svc.terminal import output

    table = Table("key", "name", "state", "scopes", "models", "limits", "expires", "last used", box=None)
    for row in rows:
        given = [f"{name.replace('_', ' ')} {limit}" for name, limit in row["limits"].items() if limit is not None]
        table.add_row(
            row["key_id"],
            escape(row["name"]),
            row["state"],
            ", ".join(row["scopes"]),
            "all" if row["models"] is None else ", ".join(row["models"]),
            ", ".join(given) or "none",
            _minute(row["expires_at"]) or "never",
            _minute(row["last_used"]),
        )
    output.print(table)


@keys.command()
@click.argument("key")
@click.option(
    "--grace", type=duration, default="0", show_default=True, help="So long the old secret is right too, as 1h."
)
@reason_option
@yes_option
@json_option
@click.pass_context
def rotate(ctx: click.Context, key: str, grace: timedelta, reason: str | None, yes: bool, as_json: bool) -> None:
    """Give KEY, an id or a name, a new secret, which is printed to stdout this once."""
    keyring = _keyring(ctx)
    found = keyring.find(key).principal
    if not grace:
        confirm(
            f"The secret that {found.name} ({found.key_id}) has now will be wrong at once. Go on?",
            yes=yes,
            as_json=as_json,
        )
    _print_issued(keyring.rotate(found.key_id, grace=grace, reason=reason), as_json=as_json)


@keys.command()
@click.argument("key")
@reason_option
@yes_option
@json_option
@click.pass_context
def revoke(ctx: click.Context, key: str, reason: str | None, yes: bool, as_json: bool) -> None:
    """End KEY, an id or a name, for ever. A running server hears of it within a second."""
    keyring = _keyring(ctx)
    found = keyring.find(key).principal
    confirm(f"{found.name} ({found.key_id}) will be wrong for ever. Go on?", yes=yes, as_json=as_json)
    revoked = keyring.revoke(found.key_id, reason=reason)
    if as_json:
        from svc.access.key_row import key_row
        from svc.terminal import print_json

        print_json(key_row(revoked))
    else:
        click.echo(f"{found.name} ({found.key_id}) is revoked")


@click.command()
@click.option(
    "--since",
    type=time_past,
    metavar="TIME",
    default="30d",
    show_default=True,
    help="From when on, as 30d or 2026-01-31, in UTC.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@click.pass_context
def usage(ctx: click.Context, since: datetime, as_csv: bool, as_json: bool) -> None:
    """Show requests and tokens by key and model, in whole hours."""
    if as_csv and as_json:
        raise click.UsageError("--csv or --json, not both")
    from svc.store.database import open_database
    from svc.store.keys import read_keys
    from svc.store.usage import usage_since

    store = open_database(settings_of(ctx).home)
    names = {key.id: key.principal.name for key in read_keys(store)}
    rows = [
        {"key_id": total.key_id or None, "name": names.get(total.key_id), "model": total.model, **total.usage._asdict()}
        for total in usage_since(store, since)
    ]
    if as_json:
        from svc.terminal import print_json

        print_json(rows)
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, ["key_id", "name", "model", "requests", "tokens_in", "tokens_out"])
        writer.writeheader()
        writer.writerows(rows)
    elif not rows:
        click.echo(f"nothing was used since {since.isoformat(timespec='minutes')}")
    else:
        _print_usage(rows)


def _print_usage(rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from svc.terminal import output

    table = Table("key", "name", "model", box=None)
    figures = ("requests", "tokens_in", "tokens_out")
    for name in figures:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        figured = (f"{row[name]:,}" for name in figures)
        table.add_row(row["key_id"] or "none", escape(row["name"] or ""), escape(row["model"]), *figured)
    table.add_row("all", "", "", *(f"{sum(row[name] for row in rows):,}" for name in figures), style="bold")
    output.print(table)


def _keyring(ctx: click.Context) -> "Keyring | RemoteKeyring":
    if remote := remote_of(ctx):
        from svc.access.remote_keyring import RemoteKeyring
        from svc.remote_server import RemoteServer

        return RemoteKeyring(RemoteServer(remote))
    from svc.access.keyring import Keyring
    from svc.actor import Actor
    from svc.store.database import open_database

    return Keyring(open_database(settings_of(ctx).home), Actor.local())


def _print_issued(issued: "IssuedKey", *, as_json: bool) -> None:
    if as_json:
        from svc.access.key_row import key_row
        from svc.terminal import print_json

        print_json({**key_row(issued.key), "secret": issued.secret})
        return
    until = issued.key.previous_until
    if until is not None and until > datetime.now(UTC):
        click.echo(f"the old secret is right until {until.isoformat(timespec='seconds')}", err=True)
    click.echo(f"the key {issued.key.id}; its secret is shown this once:", err=True)
    click.echo(issued.secret)


def _minute(text: str | None) -> str:
    return text[:16].replace("T", " ") if text else ""
