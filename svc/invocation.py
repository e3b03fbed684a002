"""What every command starts from: the settings that its flags, the file and the environment make together."""

from typing import Any

import click

from svc.files.disk import close_to_others
from svc.remote.server_url import ServerAddress
from svc.settings import Settings, load_settings

_OF_A_HOME = ("svc.db", "models", "runs")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
reason_option = click.option("--reason", metavar="TEXT", help="Why: kept in the audit log.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask whether it is meant.")


def confirm(question: str, *, yes: bool, as_json: bool = False) -> None:
    """Asks on the terminal before something is destroyed.

    Args:
        yes: it was confirmed on the command line.
        as_json: a machine asks, which answers no question.

    Raises:
        click.Abort: it was not meant.
    """
    if yes:
        return
    if as_json:
        raise click.UsageError("--json needs --yes here: nobody is asked")
    click.confirm(question, abort=True, err=True)


def remote_of(ctx: click.Context) -> ServerAddress | None:
    """The server that `svc --server` names; None without one.

    Raises:
        SettingsError: the key file cannot be used.
    """
    given = ctx.find_root().obj or {}
    url, key_file, authority = (given.get(name) for name in ("server", "key_file", "ca"))
    if not url:
        if key_file or authority:
            raise click.UsageError("--key-file and --ca go with --server")
        return None
    return ServerAddress.with_key(url, key_file, authority)


def settings_of(ctx: click.Context, **flags: Any) -> Settings:
    """The settings of one invocation, which is on the machine of its home.

    Args:
        flags: a command's own flags, as `load_settings` takes them.

    Raises:
        SettingsError: an unknown key or a wrong value.
    """
    given = ctx.find_root().obj or {}
    if given.get("server"):
        raise click.UsageError("--server goes with status, promote, rollback and keys; this is done in a home")
    settings = load_settings(given.get("config"), home=given.get("home"), **flags)
    close_to_others(settings.home, _OF_A_HOME)  # if it was made or copied by other means
    return settings
