"""The commands `svc add` and `svc remove`."""

import click

from svc.invocation import format_option, settings_of
from svc.settings.settings import Settings
from svc.version import Format


@click.command()
@click.argument("model")
@format_option
@click.pass_context
def add(ctx: click.Context, model: str, format_name: str | None) -> None:
    """Add MODEL (NAME or NAME@N) to the running server."""
    add_to_server(settings_of(ctx), model, format_name)


@click.command()
@click.argument("name")
@click.pass_context
def remove(ctx: click.Context, name: str) -> None:
    """Remove NAME from the running server once its running requests have completed."""
    from serving.models.membership_client import remove_model

    remove_model(settings_of(ctx), name)
    click.echo(f"{name} is no longer served; add it again with `svc add {name}`")


def add_to_server(settings: Settings, model: str, format_name: str | None) -> None:
    from serving.models.membership_client import add_model

    target = add_model(settings, model, Format(format_name) if format_name else None)
    click.secho(f"{target} is served", fg="green")
