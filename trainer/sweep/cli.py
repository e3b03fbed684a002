"""The commands `svc sweep` and `svc train --curve`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from svc.invocation import json_option, print_json, settings_of

if TYPE_CHECKING:
    from svc.settings.settings import Settings
    from trainer.recipe.recipe import Recipe
    from trainer.sweep.finals import Finals
    from trainer.sweep.trial_runner import TrialRunner
    from trainer.sweep.values import Values


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key, for example train.epochs=2."
)
@click.option(
    "--on",
    "place",
    type=click.Choice(["here", "ray"]),
    default="here",
    show_default=True,
    help="Train one trial after the other on this machine, or several in parallel on a Ray cluster (docs/ray.md).",
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --on ray, train at most N trials at the same time.  [default: as many as the cluster's free resources "
    "allow]",
)
@click.option("--register", is_flag=True, help="Train with the best values afterwards, and register the version.")
@click.option("--anyway", is_flag=True, help="Start even without enough memory or disk space on this machine.")
@json_option
@click.pass_context
def sweep(
    ctx: click.Context,
    recipe: Path,
    overrides: tuple[str, ...],
    place: str,
    parallel: int | None,
    register: bool,
    anyway: bool,
    as_json: bool,
) -> None:
    """Search for the best hyperparameters for RECIPE. If a sweep was interrupted, resume it."""
    from svc.terminal import quiet_libraries
    from trainer.recipe.file import load_recipe

    on_ray = place == "ray"
    if parallel is not None and not on_ray:
        raise click.UsageError("--parallel needs --on ray: on this machine, trials train one after the other")
    quiet_libraries()
    settings = settings_of(ctx)
    loaded = load_recipe(recipe, overrides)
    loaded.require_training("svc sweep")
    runner = _open_trial_runner(
        settings, loaded, "sweep", anyway=anyway, makes_version=register, on_ray=on_ray, parallel=parallel
    )
    finals = _open_finals(settings, runner)
    from trainer.sweep.picture import draw_sweep
    from trainer.sweep.sweep import RESULT_FILE, WINNER_FILE, print_sweep, run_sweep

    with runner.held():
        result = run_sweep(runner, finals)
        picture = draw_sweep(result, runner.folder / "trials.svg")
        files = [runner.folder / name for name in (RESULT_FILE, WINNER_FILE)]
        runner.publish({"heldout_loss": result.loss.value, "base_heldout_loss": result.base.value}, picture, *files)
    if not as_json:
        print_sweep(result, runner.folder, picture)
    version = _register(settings, runner, result.winner, on_ray=on_ray, as_json=as_json) if register else None
    if as_json:
        outputs = {"folder": str(runner.folder), "picture": str(picture), "version": version}
        print_json(result.model_dump(mode="json") | outputs)


def learning_curve(settings: "Settings", recipe: "Recipe", *, anyway: bool, as_json: bool) -> None:
    """Measure a recipe's learning curve and print it to stdout."""
    from svc.terminal import output

    runner = _open_trial_runner(settings, recipe, "curve", anyway=anyway, makes_version=False)
    from trainer.sweep.learning_curve import CURVE_FILE, print_curve, run_curve
    from trainer.sweep.picture import draw_curve

    with runner.held():
        curve = run_curve(runner)
        picture = draw_curve(curve, runner.folder / "curve.svg")
        figures = {"heldout_loss": curve.points[-1].loss.value}
        if curve.gain:
            figures |= {"gain": curve.gain.value, "gain_low": curve.gain.low, "gain_high": curve.gain.high}
        runner.publish(figures, picture, runner.folder / CURVE_FILE)
    if as_json:
        print_json(curve.model_dump(mode="json") | {"folder": str(runner.folder), "picture": str(picture)})
    else:
        print_curve(curve, len(runner.data.heldout))
        output.print(f"plot: {picture}", markup=False, soft_wrap=True)


def _open_trial_runner(
    settings: "Settings",
    recipe: "Recipe",
    kind: str,
    *,
    anyway: bool,
    makes_version: bool,
    on_ray: bool = False,
    parallel: int | None = None,
) -> "TrialRunner":
    """Return the runner of a recipe's trials.

    Args:
        kind: `sweep` or `curve`.
        anyway: whether to continue instead of raising an error if there is not enough memory or disk space.
        makes_version: whether the winner will be registered.
        on_ray: whether the trials are trained on a Ray cluster.
        parallel: maximum number of trials that train on the cluster at the same time, or None for as many as the
            cluster has resources for.

    Raises:
        ServerNotRunningError, BusyError, TrainingError: the cluster cannot be reached, or has too few free resources.
        InsufficientMemoryError: a trial cannot fit into memory.
        DiskSpaceError: there is not enough disk space for the version.
        RecipeError: the recipe's objective is not `sft`.
    """
    from svc.dataset.schema.objective import Objective
    from svc.engine.device import read_capabilities
    from svc.errors import RecipeError
    from svc.registry.registry import Registry
    from svc.registry.training_runs import SWEEPS_FOLDER
    from trainer.base_model.find_base import find_base
    from trainer.pipeline.estimate import estimate_here
    from trainer.pipeline.examples import read_run_examples
    from trainer.pipeline.ray_training import check_ray
    from trainer.sweep.ray_trials import RayTrials
    from trainer.sweep.trial_runner import TrialRunner

    if recipe.objective is not Objective.SFT:
        raise RecipeError(
            f"sweeps and learning curves are not possible with `objective: {recipe.objective}`",
            expected="objective: sft",
            todo="train once for each value to try: svc train RECIPE --set train.learning_rate=...",
        )
    if on_ray:
        check_ray(settings, recipe)
    registry = Registry.of(settings)
    examples = read_run_examples(recipe, cache=settings.base_cache, learnt=registry.learnt_prompts(recipe.name))
    if not on_ray:
        estimate_here(recipe, examples, settings, anyway=anyway, makes_version=makes_version, trials=True)
    base = find_base(recipe.base, settings, recipe.chat_template, recipe.rope_scaling, recipe.new_tokens)
    number_type = read_capabilities(settings.home).training_type
    cluster = RayTrials(settings, recipe, base, parallel) if on_ray else None
    sweeps = settings.home / SWEEPS_FOLDER
    return TrialRunner(sweeps, kind, recipe, base, examples, registry.tracking, number_type, cluster)


def _open_finals(settings: "Settings", runner: "TrialRunner") -> "Finals | None":
    """Return the finals of a sweep (trainer.sweep.finals), or None if the recipe has none. The base, the examples and
    the metric are checked now, before the first trial.
    """
    from svc.engine.device import read_capabilities
    from trainer.pipeline.preflight import check_base
    from trainer.sweep.finals import Finals

    if not runner.has_finals:
        return None
    capabilities = read_capabilities(settings.home)
    check_base(runner.base.folder, runner.recipe, capabilities, settings.engine)
    finals = Finals(runner, settings, capabilities)
    finals.check()
    return finals


def _register(settings: "Settings", runner: "TrialRunner", winner: "Values", *, on_ray: bool, as_json: bool) -> str:
    """Run all stages of `svc train` with the winning trial's values, and return the id of the resulting
    version.
    """
    from svc.engine.device import read_capabilities
    from svc.registry.registry import Registry
    from svc.registry.render import print_version
    from trainer.model.config import read_width
    from trainer.pipeline.ray_training import check_ray
    from trainer.pipeline.stages import Pipeline
    from trainer.sweep.values import with_values

    registry = Registry.of(settings)
    recipe = with_values(runner.recipe, winner).with_learning_rate(read_width(runner.base.folder))
    node = check_ray(settings, recipe) if on_ray else None
    capabilities = node.capabilities if node else read_capabilities(settings.home)
    parts = (settings, capabilities, registry, recipe, runner.base, runner.examples.selected)
    version = Pipeline(*parts, node=node).train_version()
    if not as_json:
        print_version(registry.manifest(version), registry.folder(version))
    return str(version)
