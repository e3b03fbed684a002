"""Tests that the set of served models can be extended, reduced or replaced."""

from sqlalchemy import Engine as Store

from svc.store.deployments import add_deployment, deployed_names, remove_deployment, set_deployments


def test_new_store_has_no_deployed_models(store: Store) -> None:
    assert deployed_names(store) == []


def test_deployed_models_are_listed_in_the_order_added(store: Store) -> None:
    for name in ("b", "a", "b"):
        add_deployment(store, name)
    assert deployed_names(store) == ["b", "a"]


def test_removing_a_model_twice_has_no_further_effect(store: Store) -> None:
    add_deployment(store, "a")
    assert remove_deployment(store, "a")
    assert not remove_deployment(store, "a")
    assert deployed_names(store) == []


def test_storing_a_list_of_deployments_replaces_all_previous_deployments(store: Store) -> None:
    add_deployment(store, "a")
    add_deployment(store, "b")
    set_deployments(store, ["c", "b"])
    assert sorted(deployed_names(store)) == ["b", "c"]
