"""The commands `svc train`, `svc import` and `svc estimate`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from svc.invocation import json_option, print_json, settings_of

if TYPE_CHECKING:
    from svc.registry.manifest import Manifest
    from svc.settings.settings import Settings


_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key, for example train.epochs=2."
)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_set_option
@click.option(
    "--quick",
    is_flag=True,
    help="Test the recipe quickly, on a tenth of the data for one epoch; the version is named NAME-quick.",
)
@click.option("--curve", is_flag=True, help="Train on 10 to 100% of the data to predict how much more data would help.")
@click.option(
    "--register-failed",
    is_flag=True,
    help="Register a version even if it fails a check; such a version cannot be promoted.",
)
@click.option(
    "--on",
    "place",
    type=click.Choice(["here", "ray"]),
    default="here",
    show_default=True,
    help="Train, merge, quantize and evaluate on this machine, or on a Ray cluster (docs/ray.md).",
)
@click.option("--skip-bad", is_flag=True, help="Skip lines that are unusable for training, and save them in a folder.")
@click.option("--anyway", is_flag=True, help="Start even without enough memory or disk space on this machine.")
@click.option(
    "--progress",
    "progress_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to which stages, steps and losses are appended as JSON lines, for other programs.",
)
@json_option
@click.pass_context
def train(
    ctx: click.Context,
    recipe: Path,
    overrides: tuple[str, ...],
    quick: bool,
    curve: bool,
    register_failed: bool,
    place: str,
    skip_bad: bool,
    anyway: bool,
    progress_file: Path | None,
    as_json: bool,
) -> None:
    """Train a model from RECIPE and register it as a version. If the run was interrupted before, resume it."""
    from svc.terminal import quiet_libraries
    from trainer.recipe.file import load_recipe

    quiet_libraries()
    settings = settings_of(ctx)
    loaded = load_recipe(recipe, overrides)
    given, on_ray = loaded.adapter.given, place == "ray"
    if given and (curve or quick or on_ray):
        raise click.UsageError(f"with {given}, nothing is trained: omit --quick, --curve and --on ray")
    if curve:
        if quick or register_failed or skip_bad or progress_file or on_ray:
            raise click.UsageError(
                "--curve registers no version; it can be combined only with --set, --anyway and --json"
            )
        from trainer.sweep.cli import learning_curve

        learning_curve(settings, loaded, anyway=anyway, as_json=as_json)
        return
    from trainer.pipeline.train import make_version

    manifest = make_version(
        settings,
        loaded,
        register_failed=register_failed,
        progress_file=progress_file,
        quick=quick,
        on_ray=on_ray,
        skip_bad=skip_bad,
        anyway=anyway,
    )
    _print_registered(settings, manifest, as_json=as_json)


@click.command("import")
@click.argument("adapter")
@click.option("--name", required=True, help="Name of the model.")
@click.option(
    "--data", required=True, multiple=True, metavar="FILE", help="Held-out examples on which the version is evaluated."
)
@click.option("--base", help="Base that the adapter was trained on.  [default: the Hub id that the adapter names]")
@click.option(
    "--format",
    "formats",
    multiple=True,
    default=("merged",),
    help="Format to create and evaluate; the adapter is always stored.  [default: merged]",
)
@_set_option
@click.option(
    "--register-failed",
    is_flag=True,
    help="Register a version even if it fails a check; such a version cannot be promoted.",
)
@json_option
@click.pass_context
def import_command(
    ctx: click.Context,
    adapter: str,
    name: str,
    data: tuple[str, ...],
    base: str | None,
    formats: tuple[str, ...],
    overrides: tuple[str, ...],
    register_failed: bool,
    as_json: bool,
) -> None:
    """Register ADAPTER, which was trained elsewhere with PEFT, as a version.

    ADAPTER is a folder or a Hugging Face id (org/name) with adapter_config.json and adapter_model.safetensors. It is
    merged, compared, evaluated and registered like an adapter that was trained here.
    """
    from svc.errors import RecipeError
    from svc.terminal import quiet_libraries
    from trainer.pipeline.train import make_version
    from trainer.pipeline.trained_adapter import find_adapter
    from trainer.recipe.file import make_recipe

    quiet_libraries()
    settings, here = settings_of(ctx), Path.cwd()
    origin = str(Path(adapter).expanduser().absolute()) if Path(adapter).expanduser().is_dir() else adapter
    trained = find_adapter(origin, settings.base_cache)
    if not (base := base or trained.base):
        raise RecipeError(
            f"the base named in the config of {adapter} is not a Hub id: "
            f"{trained.config.get('base_model_name_or_path')!r}",
            expected="the base that the adapter was trained on",
            todo="specify that base with --base, as a folder or Hub id",
        )
    content = {"name": name, "base": base, "formats": list(formats), "adapter": {"trained": origin}}
    recipe = make_recipe(content | {"data": {"heldout": list(data)}}, overrides, here, "svc import")
    manifest = make_version(settings, recipe, register_failed=register_failed)
    _print_registered(settings, manifest, as_json=as_json)


def _print_registered(settings: "Settings", manifest: "Manifest", *, as_json: bool) -> None:
    from svc.registry.registry import Registry
    from svc.registry.render import print_version

    folder = Registry.of(settings).folder(manifest.id)
    if as_json:
        print_json({"version": str(manifest.id), "folder": str(folder)})
    else:
        print_version(manifest, folder)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_set_option
@click.option(
    "--device",
    "names",
    multiple=True,
    metavar="NAME",
    help="Estimate memory, time and cost for this device, such as rtx-4090; `here` means this machine.  [default: all]",
)
@json_option
@click.pass_context
def estimate(
    ctx: click.Context, recipe: Path, overrides: tuple[str, ...], names: tuple[str, ...], as_json: bool
) -> None:
    """Estimate the memory, time and cost of RECIPE on this machine and on the GPUs in svc/engine/gpus.yaml, without
    reading the base's weights.
    """
    from svc.terminal import quiet_libraries
    from trainer.estimate.render import as_json as to_json
    from trainer.estimate.render import print_estimate
    from trainer.pipeline.estimate import estimate_devices, find_refusal
    from trainer.pipeline.examples import read_run_examples
    from trainer.recipe.file import load_recipe

    quiet_libraries()
    settings = settings_of(ctx)
    loaded = load_recipe(recipe, overrides)
    loaded.require_training("svc estimate")
    result = estimate_devices(loaded, read_run_examples(loaded, cache=settings.base_cache), settings, names)
    if as_json:
        print_json(to_json(result) | {"refused": find_refusal(result)})
    else:
        print_estimate(result)
