"""Which versions a copy of the databases names as needed."""

from sqlalchemy import Engine as Store

from svc.registry.housekeeping import protected
from svc.registry.registry import Registry
from svc.store.desired import desired_names
from svc.store.swaps import find_swap
from svc.version import VersionId


def needed_versions(registry: Registry, store: Store) -> set[VersionId]:
    """What an alias, a desired state, a rollback, an adapter or a swap under way needs.

    Args:
        registry: the folder with the versions, and the copy of MLflow's database.
        store: the copy.
    """
    found: set[VersionId] = set()
    for name in {*registry.names(), *desired_names(store)}:
        found |= protected(registry, store, name).keys()
        swap = find_swap(store, name)
        if swap is not None and swap.result is None:
            found.add(swap.target.version)
    return found
