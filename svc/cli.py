"""The `svc` command. Its subcommands are listed in a table, and each is imported only when it is run, so that help
appears immediately.

This module is the error boundary: an `SvcError`, or the error of a database that is not responding, is printed as text
and sets the exit code. Any other exception is a bug, so its traceback is shown.
"""

import atexit
import gc
import importlib
import os
import signal
import sys
from pathlib import Path

import click

from svc.errors import RegistryError, SvcError

COMMANDS = {
    # command: (import path, one line of help)
    "data": ("svc.dataset.cli:data", "Check files of chat examples and preferences."),
    "train": ("trainer.cli:train", "Train, evaluate, merge, quantize and register a version."),
    "import": ("trainer.cli:import_command", "Register an adapter that was trained elsewhere."),
    "estimate": ("trainer.cli:estimate", "Estimate what a training run needs, and whether it fits."),
    "sweep": ("trainer.sweep.cli:sweep", "Search for the best hyperparameters of a recipe."),
    "recipe": ("trainer.recipe.importers.cli:recipe", "Import recipes from Axolotl and LLaMA-Factory."),
    "models": ("svc.registry.cli:models", "List versions and aliases, or remove versions."),
    "show": ("svc.registry.cli:show", "Show one version."),
    "report": ("trainer.report.cli:report", "Write a version's report as one HTML file."),
    "compare": ("trainer.evaluation.comparison.cli:compare", "Compare two models on the same examples."),
    "export": ("trainer.export.cli:export", "Write a version's weights for other programs."),
    "push": ("trainer.hub.cli:push", "Upload a version to the Hugging Face Hub."),
    "jobs": ("serving.fine_tuning.cli:jobs", "List, follow, cancel, pause and resume fine-tuning jobs."),
    "plan": ("serving.sizing.cli:plan", "Plan how many replicas a load needs."),
    "serve": ("serving.server.cli:serve", "Serve models to OpenAI clients."),
    "add": ("serving.models.cli:add", "Add a model to the running server."),
    "remove": ("serving.models.cli:remove", "Remove a model from the running server."),
    "promote": ("serving.rollout.cli:promote", "Put another version into production."),
    "rollout": ("serving.rollout.cli:rollout", "Show how a model's rollouts went, or watch one."),
    "rollback": ("serving.rollout.cli:rollback", "Go back to the previous version."),
    "status": ("monitoring.cli:status", "Show the served versions and how well they run."),
    "drift": ("monitoring.drift.cli:drift", "Compare live traffic with a version's examples."),
    "monitor": ("monitoring.cli:monitor", "Export all metrics to Prometheus."),
    "dashboards": ("monitoring.dashboards.cli:dashboards", "Write the Grafana dashboards."),
    "chat": ("serving.server.cli:chat", "Talk to the served model in the terminal."),
    "keys": ("serving.access.cli:keys", "Create, list, rotate and revoke keys."),
    "usage": ("serving.access.cli:usage", "Show request and token counts by key and model."),
    "audit": ("serving.audit.cli:audit", "Show the audit log, or verify that it is unaltered."),
    "history": ("serving.audit.cli:history", "Show when a model's versions were served, and its rollouts."),
    "feedback": ("serving.feedback.cli:feedback", "Write users' feedback on answers as training data."),
    "forget": ("serving.audit.cli:forget", "Delete logged requests by user, key or time range."),
    "gc": ("svc.registry.cli:gc", "Delete files left by old runs, sweeps, jobs, logs and caches."),
    "store": ("svc.store.cli:store", "Move the store from SQLite to PostgreSQL."),
    "backup": ("serving.backup.cli:backup", "Back up the home folder, even while it is in use."),
    "restore": ("serving.backup.cli:restore", "Create a home folder from a backup."),
    "ui": ("svc.registry.cli:ui", "Browse runs, versions and aliases in MLflow's web UI."),
}


class LazyGroup(click.Group):
    """A click group that imports a command's module on first use, and takes the commands' help from a table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--home", type=click.Path(path_type=Path), help="Folder for all state.  [default: $SVC_HOME, else ./.svc]"
)
@click.option("--config", type=click.Path(path_type=Path), help="Settings file.  [default: ./svc.yaml, if it exists]")
@click.option(
    "--server",
    metavar="URL",
    help="URL of a remote server; supported by status, jobs, promote, rollout, rollback and keys.",
)
@click.option("--key-file", type=click.Path(path_type=Path), help="File that contains the API key for --server.")
@click.option("--ca", type=click.Path(path_type=Path), help="File with the CA certificates used to verify --server.")
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
    """Fine-tune a model on chat examples, serve it to OpenAI clients, and promote and monitor its versions."""
    ctx.obj = {"home": home, "config": config, "server": server, "key_file": key_file, "ca": ca}


def main() -> None:
    """Run the command line. SIGTERM is handled like Ctrl-C, so that no engine outlives the command that started it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.umask(0o077)  # files that a command writes are for its user only
    atexit.register(gc.freeze)  # else Python's last collection takes 2 s at exit after an import of torch and TRL
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
    except Exception as error:
        from svc.store.unavailable import StoreUnavailableError  # imports SQLAlchemy, which help does not need

        if not isinstance(error, StoreUnavailableError):
            raise
        click.secho(f"error: {error.shown}", fg="red", err=True)
        sys.exit(RegistryError.exit_code)


if __name__ == "__main__":
    main()
