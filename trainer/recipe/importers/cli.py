"""The command `svc recipe import`."""

from dataclasses import asdict
from pathlib import Path

import click

from svc.errors import RecipeError
from svc.invocation import json_option, print_json


@click.group()
def recipe() -> None:
    """Import recipes from Axolotl and LLaMA-Factory."""


@recipe.command("import")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), metavar="FILE", help="File to write.  [default: stdout]")
@click.option("--name", help="Name of the model.  [default: CONFIG's name]")
@json_option
def import_command(config: Path, to: Path | None, name: str | None, as_json: bool) -> None:
    """Make a recipe from CONFIG, a training config of Axolotl or LLaMA-Factory.

    Comments above the recipe list the keys that were changed or left out.
    """
    from trainer.recipe.importers.importer import import_recipe

    imported = import_recipe(config, to.parent if to else Path(), name)
    if to:
        try:
            with to.open("x", encoding="utf-8") as file:
                file.write(imported.text())
        except OSError as error:
            raise RecipeError(f"cannot write {to}: {error.strerror}", todo="choose another file with --to") from error
    if as_json:
        notes = [asdict(note) for note in imported.notes]
        print_json({"recipe": imported.content, "notes": notes, "refused": imported.refused})
    elif to:
        click.echo("\n".join([*imported.note_lines(), f"wrote {to}"]))
    else:
        click.echo(imported.text(), nl=False)
