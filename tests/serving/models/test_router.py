"""Tests how a request is routed to a model, and how requests for a name are split."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission.admission import Admission
from serving.admission.errors import EngineUnavailableError
from serving.engines.balancer import Lease
from serving.engines.model_names import ModelNames, ModelNotFoundError
from serving.models.router import Router
from serving.rollout.split import Split
from svc.version import Format, Target, VersionId
from tests.serving.service import OneBackend

CLIENTS = [f"client {number}" for number in range(2000)]


@asynccontextmanager
async def _no_lease(model: str, *, without: Lease | None = None) -> AsyncIterator[Lease]:
    raise NotImplementedError
    yield


def backend(name: str, *numbers: int) -> OneBackend:
    """Return a backend with these versions loaded, the first of which is in production."""
    names = ModelNames(name)
    targets = [Target(VersionId(name, number), Format.MERGED) for number in numbers]
    if targets:
        names.serve(targets[0])
        names.loaded = set(targets)
    return OneBackend(names, Admission(max_running=1, max_tokens=1, max_queued=0, queue_timeout_s=1), _no_lease)


def router(*backends: OneBackend) -> Router:
    built = Router()
    for each in backends:
        built.serve(each.names.name, each)
    return built


def test_request_is_routed_to_the_model_it_names() -> None:
    for model in ("b", "b@7", "b@production"):
        a, b = backend("a", 1), backend("b", 7)
        destination = router(a, b).find(model)
        assert (destination.backend, destination.model) == (b, model), model


def test_model_name_is_resolved_even_if_the_model_is_unavailable() -> None:
    two_models = router(backend("a", 1), backend("b"))
    names = ("a", "a@1", "a@99", "b", "b@production", "c", "")
    assert [two_models.served_name(model) for model in names] == ["a", "a", "a", "b", "b", None, None]


def test_all_names_of_all_models_are_listed() -> None:
    names = router(backend("a", 1), backend("b", 7)).names()
    assert names == ("a", "a@1", "a@production", "b", "b@7", "b@production")


def test_router_rejects_unknown_model_names() -> None:
    for model in ("", "c", "a@7", "b@1", "A"):
        with pytest.raises(ModelNotFoundError):
            router(backend("a", 1), backend("b", 7)).find(model)


def test_error_says_that_a_model_is_registered_but_not_served() -> None:
    one_model = router(backend("a", 1))
    one_model.registered = ["a", "b"]
    with pytest.raises(ModelNotFoundError, match="registered, but not served") as caught:
        one_model.find("b@3")
    assert "svc add b" in caught.value.todo


def test_removed_model_is_unknown_to_the_router() -> None:
    two_models = router(backend("a", 1), backend("b", 7))
    two_models.remove("b")
    assert two_models.names() == ("a", "a@1", "a@production")
    with pytest.raises(ModelNotFoundError):
        two_models.find("b")


def test_model_that_is_starting_is_unavailable_instead_of_unknown() -> None:
    with pytest.raises(EngineUnavailableError):
        router(backend("a", 1), backend("b")).find("b")


def test_error_says_that_a_server_has_no_models() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        Router().find("a")
    assert "none is served yet" in caught.value.expected


def test_router_returns_a_single_version_only_when_exactly_one_is_loaded() -> None:
    assert router(backend("a", 3)).only_version == VersionId("a", 3)
    assert router(backend("a")).only_version is None
    assert router(backend("a", 3), backend("b", 1)).only_version is None


def candidates(percent: float, rollout: int = 1) -> set[str]:
    """Return the clients whose requests go to version 2, the candidate."""
    backend_ = backend("a", 1, 2)
    backend_.names.candidate = VersionId("a", 2)
    split = router(backend_)
    split.split("a", Split(rollout, percent / 100))
    destinations = {who: split.find("a", who) for who in CLIENTS}
    assert {to.model for to in destinations.values()} <= {"a", backend_.names.assigned}
    return {who for who, to in destinations.items() if to.model == backend_.names.assigned}


@given(st.text(min_size=1), st.floats(0, 1))
def test_same_client_is_always_assigned_to_the_same_version(who: str, share: float) -> None:
    split = Split(1, share)
    assert split.assign(who, random.random) == split.assign(who, random.random)


def test_candidate_gets_approximately_its_configured_share_of_clients() -> None:
    for percent in (0, 5, 25, 50, 100):
        expected = len(CLIENTS) * percent / 100
        deviation = 4 * (expected * (1 - percent / 100)) ** 0.5
        assert len(candidates(percent)) == pytest.approx(expected, abs=deviation), percent


def test_clients_assigned_to_the_candidate_stay_assigned_when_its_share_grows() -> None:
    assert candidates(5) < candidates(25) < candidates(100) == set(CLIENTS)


def test_different_rollouts_begin_with_different_clients() -> None:
    assert len(candidates(25, rollout=1) & candidates(25, rollout=2)) < 0.4 * len(candidates(25))


def test_requests_from_unidentified_clients_are_divided_at_random() -> None:
    drawn = iter([0.0, 0.49, 0.51, 0.99])
    split = Router(draw=lambda: next(drawn))
    split.serve("a", backend("a", 1))
    split.split("a", Split(1, 0.5))
    assigned = [split.find("a").assignment for _ in range(4)]
    assert [each and each.candidate for each in assigned] == [True, True, False, False]


def test_request_for_a_named_version_is_not_part_of_a_rollout() -> None:
    split = router(backend("a", 1, 2))
    split.split("a", Split(1, 1.0))
    assert (split.find("a@1", "ann").model, split.find("a@1", "ann").assignment) == ("a@1", None)


def test_requesting_a_model_by_its_internal_name_raises_not_found() -> None:
    one = backend("a", 1)
    with pytest.raises(ModelNotFoundError):
        router(one).find(one.names.assigned)


def test_all_requests_are_routed_to_production_after_a_rollout_ends() -> None:
    split = router(backend("a", 1, 2))
    split.split("a", Split(1, 1.0))
    split.split("a", None)
    assert split.find("a", "ann").model == "a"


def test_router_lists_the_versions_of_all_models() -> None:
    served = router(backend("a", 3, 4), backend("b", 7), backend("c"))
    assert served.versions == {VersionId("a", 3), VersionId("a", 4), VersionId("b", 7)}
