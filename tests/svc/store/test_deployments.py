"""The set of served models is extended, reduced or replaced."""

from sqlalchemy import Engine as Store

from svc.store.deployments import add_deployment, deployed_names, remove_deployment, set_deployments


def test_no_model_is_served_at_first(store: Store) -> None:
    assert deployed_names(store) == []


def test_models_are_in_the_order_in_which_they_were_added(store: Store) -> None:
    for name in ("b", "a", "b"):
        add_deployment(store, name)
    assert deployed_names(store) == ["b", "a"]


def test_model_is_removed_once(store: Store) -> None:
    add_deployment(store, "a")
    assert remove_deployment(store, "a")
    assert not remove_deployment(store, "a")
    assert deployed_names(store) == []


def test_set_replaces_the_earlier_models(store: Store) -> None:
    add_deployment(store, "a")
    add_deployment(store, "b")
    set_deployments(store, ["c", "b"])
    assert sorted(deployed_names(store)) == ["b", "c"]
