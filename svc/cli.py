"""The `svc` command: a table of commands, each imported only when it runs, so that help is there at once.

The boundary for errors: an `SvcError` is printed as text and becomes its exit code; anything else is a defect and
keeps its traceback.
"""

import atexit
import gc
import importlib
import os
import signal
import sys
from pathlib import Path

import click

from svc.errors import SvcError

COMMANDS = {
    # command: (import path, one line of help)
    "data": ("svc.dataset.cli:data", "Check files of chat examples."),
    "train": ("trainer.cli:train", "Train, evaluate, merge, quantize, register a version."),
    "estimate": ("trainer.cli:estimate", "Say what a training takes, and whether it fits."),
    "sweep": ("trainer.sweep.cli:sweep", "Search for a recipe's best values."),
    "models": ("svc.registry.cli:models", "List versions and aliases, or remove versions."),
    "show": ("svc.registry.cli:show", "Show one version."),
    "report": ("svc.report.cli:report", "Write the report of a version as one HTML file."),
    "compare": ("trainer.comparison.cli:compare", "Ask two models the same examples: which is better?"),
    "serve": ("serving.cli:serve", "Serve models to OpenAI clients."),
    "add": ("serving.cli:add", "Have the running server serve a model too."),
    "remove": ("serving.cli:remove", "Have the running server serve a model no more."),
    "promote": ("serving.cli:promote", "Bring another version into production."),
    "rollback": ("serving.cli:rollback", "Go back to the version before."),
    "status": ("monitoring.cli:status", "Show what runs, and how well."),
    "drift": ("monitoring.drift.cli:drift", "Compare live traffic with a version's examples."),
    "monitor": ("monitoring.cli:monitor", "Export all metrics to Prometheus."),
    "dashboards": ("monitoring.dashboards.cli:dashboards", "Write the Grafana dashboards."),
    "chat": ("serving.cli:chat", "Talk to the served model in the terminal."),
    "keys": ("svc.access.cli:keys", "Make, list, rotate and revoke keys."),
    "usage": ("svc.access.cli:usage", "Show tokens and requests by key and model."),
    "audit": ("svc.audit.cli:audit", "Show who changed what, and verify that nobody changed the log."),
    "history": ("svc.audit.cli:history", "Show which version of a model served when."),
    "forget": ("svc.audit.cli:forget", "Remove what is kept of requests: of a user, of a key, of a time."),
    "gc": ("svc.registry.cli:gc", "Remove what old runs, sweeps, logs and caches have left."),
    "backup": ("svc.backup.cli:backup", "Copy the home, while it is used."),
    "restore": ("svc.backup.cli:restore", "Make a home of a backup."),
    "ui": ("svc.registry.cli:ui", "Look at runs, versions and aliases in MLflow's pages."),
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is asked for, and takes its help from the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--home", type=click.Path(path_type=Path), help="Folder for all state.  [default: $SVC_HOME, else ./.svc]"
)
@click.option("--config", type=click.Path(path_type=Path), help="Settings file.  [default: ./svc.yaml, if there]")
@click.option("--server", metavar="URL", help="A server elsewhere, for status, promote, rollback and keys.")
@click.option("--key-file", type=click.Path(path_type=Path), help="File with the key for --server.")
@click.option("--ca", type=click.Path(path_type=Path), help="File with the certificates that --server is checked by.")
@click.version_option(package_name="tuneserve")
@click.pass_context
def group(
    ctx: click.Context,
    home: Path | None,
    config: Path | None,
    server: str | None,
    key_file: Path | None,
    ca: Path | None,
) -> None:
    """Fine-tune a model on chat examples, serve it to OpenAI clients, promote and watch its versions."""
    ctx.obj = {"home": home, "config": config, "server": server, "key_file": key_file, "ca": ca}


def main() -> None:
    """Runs the command line. SIGTERM ends a command as Ctrl-C does: an engine that it started must not outlive it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.umask(0o077)  # what a command writes is its user's alone
    atexit.register(
        gc.freeze
    )  # Python looks through all that is left when it ends: 2 s after an import of torch and TRL
    try:
        sys.exit(group.main(standalone_mode=False) or 0)
    except SvcError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
