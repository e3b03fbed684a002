"""`svc models`, `svc show`, `svc ui`: what the registry holds."""

import sys

import click

from svc.errors import BusyError
from svc.invocation import json_option, settings_of
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry


@click.command()
@json_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List all versions with their aliases and figures."""
    registry = Registry.of(settings_of(ctx))
    manifests = [registry.manifest(version) for version in registry.versions()]
    aliases = {name: registry.tracking.aliases(name) for name in {manifest.name for manifest in manifests}}
    rows = [
        _row(manifest, [a for a, v in aliases[manifest.name].items() if v == manifest.id]) for manifest in manifests
    ]
    if as_json:
        from svc.terminal import print_json

        print_json(rows)
        return
    if not rows:
        click.echo("no versions yet: `svc train RECIPE` makes one")
        return
    from rich.table import Table

    from svc.terminal import output

    table = Table("version", "aliases", "created", "base", "formats", "exact match", box=None)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    output.print(table)


def _row(manifest: Manifest, aliases: list[str]) -> dict[str, str]:
    scores = (record.evaluation for record in manifest.formats.values())
    return {
        "version": str(manifest.id),
        "aliases": ", ".join(aliases),
        "created": manifest.created_at.isoformat(timespec="seconds"),
        "base": manifest.base.origin,
        "formats": ", ".join(manifest.formats),
        "exact_match": " / ".join(f"{score.exact_match.value:.3f}" for score in scores if score),
    }


@click.command()
@click.argument("version")
@json_option
@click.pass_context
def show(ctx: click.Context, version: str, as_json: bool) -> None:
    """Show one version: NAME, NAME@N or NAME@alias."""
    registry = Registry.of(settings_of(ctx))
    manifest = registry.manifest(registry.resolve(version))
    if as_json:
        from svc.terminal import print_json

        print_json(manifest.model_dump(mode="json"))
        return
    from svc.registry.card import print_card

    print_card(manifest, registry.folder(manifest.id))


@click.command()
@click.option("--port", default=5000, show_default=True, help="Port of the pages, on 127.0.0.1.")
@click.pass_context
def ui(ctx: click.Context, port: int) -> None:
    """Start MLflow's pages on this machine; Ctrl-C ends them."""
    import os
    import socket

    registry = Registry.of(settings_of(ctx))
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise BusyError(f"port {port} is in use", todo="choose another: svc ui --port 5001")
    click.echo(f"http://127.0.0.1:{port}", err=True)
    arguments = ["--backend-store-uri", registry.tracking.uri, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *arguments])  # noqa: S606 - no shell is wanted
