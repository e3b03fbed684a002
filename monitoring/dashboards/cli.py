"""The `svc dashboards` command, which writes the Grafana dashboards to files."""

import os
from pathlib import Path

import click

from svc.invocation import json_option, print_json


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("deploy/grafana/dashboards"),
    show_default=True,
    help="Folder to write to.",
)
@json_option
def dashboards(out: Path, as_json: bool) -> None:
    """Write the Grafana dashboards as JSON files, ready for import or provisioning."""
    os.umask(0o022)  # Grafana runs as another user
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for source in sorted(Path(__file__).parent.glob("*.json")):
        (out / source.name).write_bytes(source.read_bytes())
        paths.append(str(out / source.name))
    if as_json:
        print_json({"dashboards": paths})
        return
    for path in paths:
        click.echo(path)
