"""Code shared by the commands: options, JSON output, confirmation prompts, and settings from flags, file
and environment.
"""

import json
import sys
from typing import Any

import click

from svc.files.disk import close_to_others
from svc.remote.server_url import ServerAddress
from svc.settings.load import load_settings
from svc.settings.settings import Settings
from svc.version import SERVED_FORMATS, Format

_HOME_MARKS = ("svc.db", "models", "runs")
json_option = click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON.")
reason_option = click.option("--reason", metavar="TEXT", help="Reason to record in the audit log.")
yes_option = click.option("--yes", is_flag=True, help="Skip the confirmation prompt.")


def confirm(question: str, *, yes: bool, as_json: bool = False) -> None:
    """Ask for confirmation on the terminal before a destructive action.

    Args:
        yes: whether `--yes` was given, which skips the question.
        as_json: whether `--json` was given. The caller is then a program and cannot answer.

    Raises:
        click.Abort: the answer was no.
    """
    if yes:
        return
    if as_json:
        raise click.UsageError("with --json, this command requires --yes, because it cannot ask for confirmation")
    click.confirm(question, abort=True, err=True)


def print_json(value: Any) -> None:
    """Write one JSON value to stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def remote_of(ctx: click.Context) -> ServerAddress | None:
    """Return the server given by `svc --server`, or None if the option was not given.

    Raises:
        SettingsError: the key file cannot be used.
    """
    given = ctx.find_root().obj or {}
    url, key_file, authority = (given.get(name) for name in ("server", "key_file", "ca"))
    if not url:
        if key_file or authority:
            raise click.UsageError("--key-file and --ca require --server")
        return None
    return ServerAddress.with_key(url, key_file, authority)


def settings_of(ctx: click.Context, **flags: Any) -> Settings:
    """Return the settings for a command that needs a home folder on this machine.

    Args:
        flags: the command's own flags, in the form expected by `load_settings`.

    Raises:
        SettingsError: a key is unknown or a value is invalid.
    """
    given = ctx.find_root().obj or {}
    if given.get("server"):
        raise click.UsageError(
            "--server works only with status, jobs, promote, rollout, rollback and keys; "
            "this command needs a local home folder"
        )
    settings = load_settings(given.get("config"), home=given.get("home"), **flags)
    close_to_others(settings.home, _HOME_MARKS)  # if it was created or copied by other means
    return settings


format_option = click.option(
    "--format",
    "format_name",
    type=click.Choice([format.value for format in (*SERVED_FORMATS, Format.ADAPTER)]),
    help="Format to serve; with `adapter`, many versions can share one base model.",
)
