"""Trains on a Ray cluster: checks that this is possible, and starts the workers. See docs/ray.md."""

from collections.abc import Iterator
from contextlib import contextmanager

from svc.errors import RecipeError, SettingsError
from svc.ray_cluster import connected, find_address
from svc.registry.objects import ObjectStore
from svc.settings import Settings
from svc.terminal import console
from trainer.base_model.resolve import Base
from trainer.pipeline.run_folder import Run
from trainer.recipe.recipe import Recipe
from trainer.training.devices import share_of
from trainer.training.ray_processes import RayProcesses, choose_kind, reserved
from trainer.training.ray_worker import SharedRun
from trainer.training.shared_base import share_base
from trainer.training.shared_checkpoints import SharedCheckpoints
from trainer.training.sole_trainer import sole_trainer


def check_ray(settings: Settings, recipe: Recipe) -> None:
    """Check that the cluster has enough free resources for a recipe's workers. This takes seconds.

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

        kind = choose_kind(settings.ray, ray.cluster_resources())
        with reserved(kind, size, settings.ray.wait_s):
            console.print(f"  Ray at {address}: {size} x {kind} free", markup=False, soft_wrap=True)


def count_workers(recipe: Recipe) -> int:
    """Return the number of workers that train a recipe.

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
            "the adapters of single epochs stay on the nodes", todo="remove checkpoints.keep_epochs from the recipe"
        )
    share_of(train, asked or 1)
    return asked or 1


@contextmanager
def ray_processes(
    settings: Settings, recipe: Recipe, base: Base, run: Run, checkpoints: SharedCheckpoints
) -> Iterator[RayProcesses]:
    """Upload a run's base model and newest checkpoint to the object store, then yield workers that train the run.

    Raises:
        RegistryError: the object store does not respond, or rejects a request.
        ServerNotRunningError, BusyError, TrainingError: as for `check_ray`.
    """
    assert settings.artifacts.url is not None  # noqa: S101 - check_ray
    size, address = count_workers(recipe), find_address(settings.ray.address)
    name = share_base(ObjectStore(settings.artifacts.url), base.folder, base.revision)
    tracking = run.tracking.read_bytes()
    shared = SharedRun(settings.artifacts.url, run.folder.name, name, tracking, settings.ray.folder, attempt="")
    with connected(address), sole_trainer(run.folder.name):
        import ray

        checkpoints.send_newest()
        kind = choose_kind(settings.ray, ray.cluster_resources())
        with RayProcesses(settings.ray, kind, size, shared, checkpoints) as processes:
            yield processes
