"""Trains on a Ray cluster: checks that the cluster suits the recipe, and starts the workers. See docs/ray.md."""

from collections.abc import Mapping
from dataclasses import replace

from svc.errors import RecipeError, SettingsError
from svc.ray.cluster import connected, find_address
from svc.ray.need import Need
from svc.settings.settings import Settings
from svc.terminal import console
from trainer.recipe.recipe import Recipe
from trainer.training.parallel.devices import share_of
from trainer.training.parallel.ray_processes import choose_kind, describe_node, reserved
from trainer.training.parallel.ray_worker import NodeFacts


def check_ray(settings: Settings, recipe: Recipe) -> NodeFacts:
    """Check that the cluster has enough free resources for a recipe's workers, and that a node has enough for the
    stages after training. The check takes several seconds.

    Returns:
        Information about the node for the stages after training.

    Raises:
        SettingsError: the address of the cluster or of the object store is not set.
        RecipeError: the recipe cannot be used for training on a cluster.
        ServerNotRunningError: the cluster cannot be reached.
        BusyError, TrainingError: the cluster has too few free resources.
    """
    size, address = count_workers(recipe), find_address(settings.ray.address)
    if settings.artifacts.url is None:
        raise SettingsError(
            "training on Ray needs an object store, through which the nodes get the base model and checkpoints",
            expected="artifacts.url, such as s3://bucket/prefix, with credentials in the environment of each node",
            todo="set artifacts.url in svc.yaml: docs/scale.md#object-storage",
        )
    with connected(address):
        import ray

        resources = ray.cluster_resources()
        kind = choose_kind(settings.ray, resources)
        with reserved(kind, size, settings.ray.wait_s):
            console.print(f"  Ray at {address}: {size} x {kind} free", markup=False, soft_wrap=True)
        return describe_node(settings.ray, choose_stage_kind(settings, resources))


def count_workers(recipe: Recipe) -> int:
    """Return the number of workers needed to train with a recipe.

    Raises:
        RecipeError: the recipe cannot be used for training on a cluster.
    """
    train, asked = recipe.train, recipe.train.devices
    if recipe.objective.is_preference:
        raise RecipeError("preference tuning has not been tested on a Ray cluster", todo="omit --on ray")
    if isinstance(asked, tuple):
        raise RecipeError(
            f"train.devices lists GPUs {', '.join(map(str, asked))}, but Ray chooses the GPUs",
            expected="the number of workers",
            todo=f"set train.devices to {len(asked)}",
        )
    if recipe.checkpoints.keep_epochs:
        raise RecipeError(
            "checkpoints.keep_epochs cannot be used on Ray: the adapters of individual epochs would stay on the nodes",
            todo="remove checkpoints.keep_epochs from the recipe",
        )
    share_of(train, asked or 1)
    return asked or 1


def choose_stage_kind(settings: Settings, resources: Mapping[str, float]) -> Need:
    """Return the resources to reserve on one node for the stages after training, which run an engine.

    Args:
        resources: all resources of the cluster.
    """
    kind, engine = choose_kind(settings.ray, resources), settings.engine
    if kind.gpus:
        return replace(kind, gpus=engine.tensor_parallel or 1)
    return replace(kind, cpus=engine.cores or kind.cpus)
