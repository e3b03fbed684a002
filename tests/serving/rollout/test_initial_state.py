"""Tests which version a server starts with."""

import pytest
from sqlalchemy import Engine as Store

from serving.rollout.initial_state import choose_deployments, choose_desired
from svc.errors import NotFoundError, RefusedError
from svc.identity.actor import Actor
from svc.store.audit import read_events
from svc.store.deployments import deployed_names
from svc.store.desired import change_desired, read_desired
from svc.store.leases import remove_server, report_server
from svc.version import Alias, Format, VersionId
from tests.serving.home import Home
from tests.serving.versions import NAME, make_version, target


def choose(home: Home, model: str | None = None, format: Format | None = None) -> tuple[str, Format]:
    (desired,) = choose_deployments(home.registry, home.store, [model] if model else [], format)
    assert deployed_names(home.store) == [desired.name]
    assert read_desired(home.store, desired.name) == desired
    return str(desired.target.version), desired.target.format


def test_single_registered_model_is_served_if_no_name_is_given(home: Home) -> None:
    assert choose(home) == (f"{NAME}@3", Format.MERGED)


def test_error_is_raised_if_no_name_is_given_and_several_models_exist(home: Home) -> None:
    make_version(home.registry, 1, name="other")
    with pytest.raises(NotFoundError, match="no model was given"):
        choose(home)
    assert choose(home, "other")[0] == "other@1"


def test_server_may_start_without_a_model_if_no_name_is_given_and_no_model_is_required(home: Home) -> None:
    assert choose_deployments(home.registry, home.store, [], None, needed=False) == []
    choose(home, NAME)
    (desired,) = choose_deployments(home.registry, home.store, [], None, needed=False)
    assert desired.name == NAME


def test_last_served_model_is_chosen_if_no_name_is_given(home: Home) -> None:
    make_version(home.registry, 1, name="other")
    choose(home, NAME)
    assert choose(home)[0] == f"{NAME}@3"


def test_error_for_an_empty_registry_shows_how_to_create_a_version(home: Home) -> None:
    home.registry.models = home.registry.models / "empty"
    with pytest.raises(NotFoundError, match="svc train"):
        choose(home)


def test_model_name_selects_the_most_recently_served_version(home: Home) -> None:
    change_desired(home.store, None, target(2), None)
    assert choose(home, NAME) == (f"{NAME}@2", Format.MERGED)


def test_name_of_a_never_served_model_selects_its_production_version(home: Home) -> None:
    home.book.book[Alias.PRODUCTION] = VersionId(NAME, 1)
    assert choose(home, NAME)[0] == f"{NAME}@1"


def test_alias_selects_its_version_even_if_a_different_version_was_served_last(home: Home) -> None:
    change_desired(home.store, None, target(2), None)
    home.book.book[Alias.CANDIDATE] = VersionId(NAME, 3)
    assert choose(home, f"{NAME}@candidate")[0] == f"{NAME}@3"


def test_version_requested_at_startup_becomes_desired_and_the_old_one_is_recorded_as_previous(home: Home) -> None:
    seen = change_desired(home.store, None, target(2), None)
    desired = choose_desired(home.registry, home.store, f"{NAME}@1", None)
    assert (desired.target, desired.previous, desired.generation) == (target(1), target(2), seen.generation + 1)


def test_desired_version_is_not_recorded_again_if_it_is_unchanged(home: Home) -> None:
    seen = change_desired(home.store, None, target(2), None)
    assert choose_desired(home.registry, home.store, f"{NAME}@2", None) == seen


def test_model_name_selects_the_newest_version_that_passed_every_check(home: Home) -> None:
    make_version(home.registry, 4, failed=("GPTQ lost 0.3",))
    assert choose(home, NAME)[0] == f"{NAME}@3"


def test_version_that_failed_a_check_is_not_served(home: Home) -> None:
    make_version(home.registry, 4, failed=("GPTQ lost 0.3", "another template"))
    with pytest.raises(RefusedError, match=r"tuned@4 failed a check.*: GPTQ lost 0.3; another template"):
        choose(home, f"{NAME}@4")
    assert read_desired(home.store, NAME) is None


def test_version_that_failed_a_check_is_served_again_if_it_was_once_promoted_by_force(home: Home) -> None:
    make_version(home.registry, 4, failed=("GPTQ lost 0.3",))
    change_desired(home.store, None, target(4), None, forced="a test")
    assert choose(home, NAME)[0] == f"{NAME}@4"


def test_gptq_format_is_preferred_if_available(home: Home) -> None:
    make_version(home.registry, 4, formats=(Format.MERGED, Format.GPTQ))
    assert choose(home, f"{NAME}@4") == (f"{NAME}@4", Format.GPTQ)


def test_int8_is_preferred_to_fp8_and_merged(home: Home) -> None:
    make_version(home.registry, 4, formats=(Format.MERGED, Format.FP8, Format.INT8, Format.GGUF))
    assert choose(home, f"{NAME}@4") == (f"{NAME}@4", Format.INT8)


def test_serving_a_version_in_gguf_format_is_refused(home: Home) -> None:
    make_version(home.registry, 4, formats=(Format.MERGED, Format.GGUF))
    with pytest.raises(RefusedError, match=r"tuned@4 \(gguf\) cannot be served by vLLM"):
        choose(home, f"{NAME}@4", Format.GGUF)
    assert choose(home, f"{NAME}@4") == (f"{NAME}@4", Format.MERGED)


def test_last_served_format_is_chosen_again_unless_a_different_format_is_requested(home: Home) -> None:
    make_version(home.registry, 4, formats=(Format.MERGED, Format.GPTQ))
    change_desired(home.store, None, target(4), None)
    assert choose(home, f"{NAME}@4") == (f"{NAME}@4", Format.MERGED)
    assert choose(home, f"{NAME}@4", Format.GPTQ) == (f"{NAME}@4", Format.GPTQ)


def test_unknown_version_does_not_become_desired(home: Home) -> None:
    for model in ("nobody", f"{NAME}@9", f"{NAME}@candidate", "../etc", f"{NAME}@x"):
        with pytest.raises(NotFoundError):
            choose(home, model)
        assert read_desired(home.store, NAME) is None, model


def test_format_that_does_not_exist_does_not_become_desired(home: Home) -> None:
    with pytest.raises(NotFoundError, match="has no format gptq"):
        choose(home, NAME, Format.GPTQ)
    assert read_desired(home.store, NAME) is None


def test_version_without_merged_weights_is_served_only_if_the_adapter_format_is_requested(home: Home) -> None:
    make_version(home.registry, 4, formats=(Format.ADAPTER,))
    with pytest.raises(NotFoundError, match="no format that can be served without a base") as caught:
        choose(home, f"{NAME}@4")
    assert "--format adapter" in caught.value.todo
    assert choose(home, f"{NAME}@4", Format.ADAPTER) == (f"{NAME}@4", Format.ADAPTER)


def test_adapter_that_vllm_cannot_apply_does_not_become_desired(home: Home) -> None:
    make_version(home.registry, 4, formats=(Format.MERGED, Format.ADAPTER), adapter={"use_dora": True})
    with pytest.raises(RefusedError, match="cannot be served as an adapter: it is DoRA") as caught:
        choose(home, f"{NAME}@4", Format.ADAPTER)
    assert "--format merged" in caught.value.todo
    assert read_desired(home.store, NAME) is None


def test_change_of_the_desired_version_is_recorded_in_the_audit_log(home: Home) -> None:
    choose(home, f"{NAME}@1")
    choose(home, f"{NAME}@1")
    choose(home, f"{NAME}@2")
    events = read_events(home.store, newest=9)
    assert [(event.action, event.subject, event.details["generation"]) for event in events] == [
        ("serve", f"{NAME}@1", 1),
        ("serve", f"{NAME}@2", 2),
    ]
    assert {event.actor for event in events} == {Actor.local().name}


@pytest.fixture
def shared(home: Home, postgresql_store: Store) -> Home:
    """Return a home whose store another server uses, which serves version 1."""
    home.store = postgresql_store
    make_version(home.registry, 1, name="other")
    choose(home, f"{NAME}@1")
    report_server(postgresql_store, "a", "gpu-1:8000", [])
    return home


@pytest.mark.parametrize("model", [None, NAME, f"{NAME}@1"])
def test_second_server_may_start_with_the_same_models(shared: Home, model: str | None) -> None:
    assert choose(shared, model)[0] == f"{NAME}@1"


@pytest.mark.parametrize("models", [["other"], [NAME, "other"]])
def test_server_start_is_refused_if_a_running_server_serves_different_models(shared: Home, models: list[str]) -> None:
    with pytest.raises(RefusedError, match=rf"gpu-1:8000\) serve {NAME}") as raised:
        choose_deployments(shared.registry, shared.store, models, None)
    assert "svc add" in raised.value.todo
    assert deployed_names(shared.store) == [NAME]
    assert read_desired(shared.store, "other") is None


def test_startup_version_is_refused_if_a_running_server_serves_a_different_version(shared: Home) -> None:
    before = read_desired(shared.store, NAME)
    with pytest.raises(RefusedError) as raised:
        choose_deployments(shared.registry, shared.store, [f"{NAME}@2"], None)
    assert f"svc promote {NAME}@2" in raised.value.todo
    assert read_desired(shared.store, NAME) == before


def test_server_may_start_with_different_models_after_the_other_server_has_stopped(shared: Home) -> None:
    remove_server(shared.store, "a")
    assert choose(shared, "other")[0] == "other@1"
