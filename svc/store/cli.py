"""`svc store migrate` moves the store of a home folder to PostgreSQL."""

from pathlib import Path

import click

from svc.errors import RefusedError
from svc.invocation import json_option, print_json, settings_of


@click.group()
def store() -> None:
    """Move the store (desired versions, keys, audit log, requests, feedback and drift) to PostgreSQL."""


@store.command("migrate")
@click.option(
    "--from",
    type=click.Choice(["sqlite"]),
    default="sqlite",
    show_default=True,
    expose_value=False,
    help="Kind of store to copy.",
)
@click.option(
    "--to",
    "url",
    metavar="URL",
    required=True,
    help="URL of an empty PostgreSQL database, as in `store.url`: postgresql://user@host:5432/database.",
)
@click.option(
    "--password-file",
    type=click.Path(path_type=Path),
    help="File with the password for the database, unless the URL contains it.",
)
@json_option
@click.pass_context
def migrate_store(ctx: click.Context, url: str, password_file: Path | None, as_json: bool) -> None:
    """Copy all rows of svc.db to a PostgreSQL database, and compare them.

    First stop the server and all other commands that use the home folder. If anything fails, nothing is copied. The
    file svc.db is kept.
    """
    settings = settings_of(ctx)
    if settings.store.url is not None:
        raise RefusedError(
            "store.url is set, so this home folder already uses PostgreSQL",
            todo="if svc.db is the store to copy, remove store.url until the copy is complete",
        )
    given = {"url": url, "password_file": password_file}
    target = settings_of(ctx, store={key: value for key, value in given.items() if value is not None})

    from svc.store.database import SQLITE_FILE
    from svc.store.migrate import migrate
    from svc.terminal import print_table

    result = migrate(settings.home, target.store)
    path, count = settings.home / SQLITE_FILE, sum(result.rows.values())
    if as_json:
        print_json({"to": result.target, "rows": result.rows, "replaced_texts": result.replaced_texts, "kept": path})
    else:
        print_table(("table", "rows"), result.rows.items())
        click.secho(f"copied {count} rows to {result.target} and compared each copy with the original", fg="green")
    if result.replaced_texts:
        click.echo(
            f"NULs and invalid bytes in {result.replaced_texts} strings were replaced with question marks in the copy",
            err=True,
        )
    click.echo(
        f"{path} is unchanged, and remains the store of this home folder until store.url is set. Next:\n"
        f"  1. set store.url{' and store.password_file' if password_file else ''} in svc.yaml\n"
        "  2. start the server, and check that `svc keys list` shows your keys\n"
        f"  3. delete {path}, {path.name}-wal and {path.name}-shm: `svc forget` does not delete content in these files",
        err=True,
    )
