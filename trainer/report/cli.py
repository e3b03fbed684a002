"""The `svc report` command, which writes all facts about a version to one page."""

from pathlib import Path

import click

from svc.invocation import json_option, print_json, settings_of
from svc.registry.registry import Registry


@click.command()
@click.argument("version")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.  [default: NAME-N.html in the working folder]",
)
@click.option("--open", "show", is_flag=True, help="Open the file in the browser.")
@json_option
@click.pass_context
def report(ctx: click.Context, version: str, output: Path | None, show: bool, as_json: bool) -> None:
    """Write the report of VERSION (NAME, NAME@N or NAME@alias) as a single HTML file that works offline."""
    from svc.store.database import open_store
    from trainer.report.page import report_page
    from trainer.report.report import gather_report

    settings = settings_of(ctx)
    registry = Registry.of(settings)
    found = registry.resolve(version)
    gathered = gather_report(registry, found, open_store(settings))
    path = (output or Path(f"{found.name}-{found.number}.html")).absolute()
    try:
        path.write_text(report_page(gathered), "utf-8")
    except OSError as error:
        raise click.UsageError(f"cannot write {path}: {error.strerror}") from error
    if as_json:
        print_json({"path": str(path), **gathered.figures()})
    else:
        click.echo(path)
    if show:
        click.launch(path.as_uri())
