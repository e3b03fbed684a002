"""The version that a server starts with."""

import pytest

from serving.rollout.initial_state import choose_deployments, choose_desired
from svc.errors import NotFoundError, RefusedError
from svc.identity.actor import Actor
from svc.store.audit import read_events
from svc.store.deployments import deployed_names
from svc.store.desired import change_desired, read_desired
from svc.version import Alias, Format, VersionId
from tests.serving.home import Home
from tests.serving.versions import NAME, make_version, target


def choose(home: Home, model: str | None = None, format: Format | None = None) -> tuple[str, Format]:
    (desired,) = choose_deployments(home.registry, home.store, [model] if model else [], format)
    assert deployed_names(home.store) == [desired.name]
    assert read_desired(home.store, desired.name) == desired
    return str(desired.target.version), desired.target.format


def test_only_model_is_chosen_when_none_is_named(home: Home) -> None:
    assert choose(home) == (f"{NAME}@3", Format.MERGED)


def test_error_is_raised_when_none_of_several_models_is_named(home: Home) -> None:
    make_version(home.registry, 1, name="other")
    with pytest.raises(NotFoundError, match="no model was named"):
        choose(home)
    assert choose(home, "other")[0] == "other@1"


def test_last_served_model_is_chosen_when_none_is_named(home: Home) -> None:
    make_version(home.registry, 1, name="other")
    choose(home, NAME)
    assert choose(home)[0] == f"{NAME}@3"


def test_error_shows_how_to_create_a_version_when_there_is_none(home: Home) -> None:
    home.registry.models = home.registry.models / "empty"
    with pytest.raises(NotFoundError, match="svc train"):
        choose(home)


def test_name_means_the_version_that_served_last(home: Home) -> None:
    change_desired(home.store, None, target(2), None)
    assert choose(home, NAME) == (f"{NAME}@2", Format.MERGED)


def test_name_means_its_production_version_when_it_was_never_served(home: Home) -> None:
    home.book.book[Alias.PRODUCTION] = VersionId(NAME, 1)
    assert choose(home, NAME)[0] == f"{NAME}@1"


def test_alias_means_its_version_even_when_another_was_served(home: Home) -> None:
    change_desired(home.store, None, target(2), None)
    home.book.book[Alias.CANDIDATE] = VersionId(NAME, 3)
    assert choose(home, f"{NAME}@candidate")[0] == f"{NAME}@3"


def test_named_version_becomes_desired_and_the_previous_one_is_kept(home: Home) -> None:
    seen = change_desired(home.store, None, target(2), None)
    desired = choose_desired(home.registry, home.store, f"{NAME}@1", None)
    assert (desired.target, desired.previous, desired.generation) == (target(1), target(2), seen.generation + 1)


def test_nothing_changes_when_the_version_is_already_desired(home: Home) -> None:
    seen = change_desired(home.store, None, target(2), None)
    assert choose_desired(home.registry, home.store, f"{NAME}@2", None) == seen


def test_name_means_the_newest_version_that_passed_every_check(home: Home) -> None:
    make_version(home.registry, 4, failed=("GPTQ lost 0.3",))
    assert choose(home, NAME)[0] == f"{NAME}@3"


def test_version_that_failed_a_check_is_not_served(home: Home) -> None:
    make_version(home.registry, 4, failed=("GPTQ lost 0.3", "another template"))
    with pytest.raises(RefusedError, match=r"tuned@4 failed a check.*: GPTQ lost 0.3; another template"):
        choose(home, f"{NAME}@4")
    assert read_desired(home.store, NAME) is None


def test_failed_version_is_served_again_when_it_was_forced_before(home: Home) -> None:
    make_version(home.registry, 4, failed=("GPTQ lost 0.3",))
    change_desired(home.store, None, target(4), None, forced="a test")
    assert choose(home, NAME)[0] == f"{NAME}@4"


def test_gptq_is_preferred_when_the_version_has_it(home: Home) -> None:
    make_version(home.registry, 4, formats=(Format.MERGED, Format.GPTQ))
    assert choose(home, f"{NAME}@4") == (f"{NAME}@4", Format.GPTQ)


def test_format_that_served_last_is_kept(home: Home) -> None:
    make_version(home.registry, 4, formats=(Format.MERGED, Format.GPTQ))
    change_desired(home.store, None, target(4), None)
    assert choose(home, f"{NAME}@4") == (f"{NAME}@4", Format.MERGED)
    assert choose(home, f"{NAME}@4", Format.GPTQ) == (f"{NAME}@4", Format.GPTQ)


def test_unknown_version_does_not_become_desired(home: Home) -> None:
    for model in ("nobody", f"{NAME}@9", f"{NAME}@candidate", "../etc", f"{NAME}@x"):
        with pytest.raises(NotFoundError):
            choose(home, model)
        assert read_desired(home.store, NAME) is None, model


def test_missing_format_does_not_become_desired(home: Home) -> None:
    with pytest.raises(NotFoundError, match="has no format gptq"):
        choose(home, NAME, Format.GPTQ)
    assert read_desired(home.store, NAME) is None


def test_version_with_only_an_adapter_is_served_as_one_when_requested(home: Home) -> None:
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


def test_new_version_is_in_the_audit_log(home: Home) -> None:
    choose(home, f"{NAME}@1")
    choose(home, f"{NAME}@1")
    choose(home, f"{NAME}@2")
    events = read_events(home.store, newest=9)
    assert [(event.action, event.subject, event.details["generation"]) for event in events] == [
        ("serve", f"{NAME}@1", 1),
        ("serve", f"{NAME}@2", 2),
    ]
    assert {event.actor for event in events} == {Actor.local().name}
