"""`svc train`."""

import sys
from pathlib import Path

import click

from svc.invocation import json_option, settings_of


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a recipe's key: train.epochs=2.")
@click.option("--skip-bad", is_flag=True, help="Leave out lines that cannot be trained on, and keep them in a folder.")
@json_option
@click.pass_context
def train(ctx: click.Context, recipe: Path, overrides: tuple[str, ...], skip_bad: bool, as_json: bool) -> None:
    """Make a version of RECIPE, from where an earlier try was interrupted."""
    from svc.dataset.bad_lines import BadLines
    from svc.terminal import console, quiet_libraries
    from trainer.recipe import load_recipe
    from trainer.run import read_run_examples

    quiet_libraries()
    settings = settings_of(ctx)
    loaded = load_recipe(recipe, overrides)
    bad_lines = BadLines(settings.home / "bad_lines" / loaded.name) if skip_bad else None
    examples = read_run_examples(loaded, cache=settings.base_cache, bad_lines=bad_lines)
    if bad_lines and bad_lines.count:
        console.print(f"[yellow]left out {bad_lines.count} bad lines: they lie in {bad_lines.folder}[/yellow]")
    from trainer.pipeline import find_base, open_pipeline

    pipeline = open_pipeline(settings, loaded, examples, find_base(loaded, settings))
    manifest = pipeline.registry.manifest(pipeline.train_version())
    if as_json:
        from svc.terminal import print_json

        print_json({"version": str(manifest.id), "folder": str(pipeline.registry.folder(manifest.id))})
        sys.exit(0)
    from svc.registry.card import print_card

    print_card(manifest, pipeline.registry.folder(manifest.id))
