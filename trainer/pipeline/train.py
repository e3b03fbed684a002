"""Makes a version from a recipe, as `svc train` and `svc import` do: reads the examples, checks that the run fits,
finds the base, and runs the stages.
"""

from pathlib import Path

from svc.dataset.readers.bad_lines import BadLines
from svc.engine.device import read_capabilities
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.terminal import console
from svc.training_progress import ProgressFile
from trainer.base_model.find_base import find_base, find_config
from trainer.model.config import read_width
from trainer.pipeline.combined_adapter import CombinedAdapter, find_combined, warn_learnt
from trainer.pipeline.estimate import estimate_here
from trainer.pipeline.examples import Examples, read_run_examples
from trainer.pipeline.quick_trial import quick_trial, whole_run_seconds
from trainer.pipeline.ray_training import check_ray
from trainer.pipeline.stages import Pipeline
from trainer.pipeline.trained_adapter import TrainedAdapter, check_fits, find_adapter
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import Stage
from trainer.recipe.train import TooLong
from trainer.training.summary import TrainingSummary


def make_version(
    settings: Settings,
    recipe: Recipe,
    *,
    register_failed: bool,
    progress_file: Path | None = None,
    quick: bool = False,
    on_ray: bool = False,
    skip_bad: bool = False,
    anyway: bool = False,
) -> Manifest:
    """Make and register a version, and return its manifest. If the adapter already exists or is combined from other
    adapters, nothing is trained. If the run was interrupted before, it is resumed.

    Args:
        register_failed: whether to register a version even if it fails a check.
        progress_file: file to which the progress is written for other programs.
        quick: whether to test the recipe on a tenth of the data for one epoch (trainer.pipeline.quick_trial).
        on_ray: whether to run the stages on a Ray cluster.
        skip_bad: whether to skip lines that cannot be trained on, and to save them in a folder.
        anyway: whether to start even without enough memory or disk space on this machine.

    Raises:
        SvcError: the recipe, its data or its base cannot be used, or a stage failed.
    """
    node = check_ray(settings, recipe) if on_ray else None
    if skip_bad and recipe.train.too_long is TooLong.ERROR:
        recipe = recipe.changed({"train.too_long": TooLong.DROP})
    bad_lines = BadLines(settings.home / "bad_lines" / recipe.name) if skip_bad else None
    registry = Registry.of(settings)
    learnt = registry.learnt_prompts(recipe.name)
    examples = read_run_examples(recipe, cache=settings.base_cache, bad_lines=bad_lines, learnt=learnt)
    if bad_lines and bad_lines.count:
        console.print(f"[yellow]skipped {bad_lines.count} bad lines and saved them in {bad_lines.folder}[/yellow]")
    given, expected, full_run = _find_given(settings, recipe, registry, examples), None, recipe.train
    if given:
        recipe = _check_given(settings, recipe, given)
    if quick:
        recipe, examples = quick_trial(recipe, examples)
    if not given and not on_ray:
        expected = estimate_here(recipe, examples, settings, anyway=anyway)
    base = find_base(recipe.base, settings, recipe.chat_template, recipe.rope_scaling, recipe.new_tokens)
    if isinstance(given, CombinedAdapter):
        given.check_revision(base)
    pipeline = Pipeline(
        settings,
        node.capabilities if node else read_capabilities(settings.home),
        registry,
        recipe.with_learning_rate(read_width(base.folder)),
        base,
        examples,
        register_failed=register_failed,
        expected=expected,
        progress=ProgressFile(progress_file) if progress_file else None,
        node=node,
        trained=given,
    )
    manifest = registry.manifest(pipeline.train_version())
    if quick:
        console.print("the quick test passed")
        seconds = whole_run_seconds(full_run, pipeline.run.load(Stage.TRAIN, TrainingSummary))
        if seconds is not None:
            console.print(f"without --quick, training alone will take about {seconds / 60:.0f} min on this machine")
    return manifest


def _find_given(
    settings: Settings, recipe: Recipe, registry: Registry, examples: Examples
) -> TrainedAdapter | CombinedAdapter | None:
    """Return the adapter that the recipe names or combines, or None if an adapter is to be trained."""
    if combine := recipe.adapter.combine:
        combined = find_combined(recipe, combine, settings.base_cache, registry)
        warn_learnt(registry, combine.versions, examples.heldout)
        return combined
    return find_adapter(recipe.adapter.trained, settings.base_cache) if recipe.adapter.trained else None


def _check_given(settings: Settings, recipe: Recipe, given: TrainedAdapter | CombinedAdapter) -> Recipe:
    """Check that an existing adapter fits its base, before the base's weights are fetched. Return the recipe, completed
    with the adapter's type, rank, alpha and layers.
    """
    recipe = given.describe(recipe)
    for warning in given.warnings(recipe.base):
        console.print(f"[yellow]{warning}[/yellow]", soft_wrap=True)
    config = find_config(recipe.base, settings, recipe.chat_template, recipe.rope_scaling, recipe.new_tokens)
    for part in given.parts:
        check_fits(config, part)
    return recipe
