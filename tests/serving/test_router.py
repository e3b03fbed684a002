"""The model of a request, and how the requests of a name are split."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission.admission import Admission
from serving.admission.errors import EngineUnavailableError
from serving.model_names import ModelNames, ModelNotFoundError
from serving.replicas.balancer import Lease
from serving.router import Router, Share
from svc.version import Format, Target, VersionId
from tests.serving.service import OneBackend

CLIENTS = [f"client {number}" for number in range(2000)]


@asynccontextmanager
async def _no_lease(model: str, *, without: Lease | None = None) -> AsyncIterator[Lease]:
    raise NotImplementedError
    yield


def backend(name: str, *numbers: int) -> OneBackend:
    """Return a backend with these versions loaded; the first is in production."""
    names = ModelNames(name)
    targets = [Target(VersionId(name, number), Format.MERGED) for number in numbers]
    if targets:
        names.serve(targets[0])
        names.loaded = set(targets)
    return OneBackend(names, Admission(max_running=1, max_tokens=1, max_queued=0, queue_timeout_s=1), _no_lease)


def router(*backends: OneBackend) -> Router:
    built = Router()
    for each in backends:
        built.serve(each.names.name, [Share(each)])
    return built


def test_name_goes_to_its_model() -> None:
    for model in ("b", "b@7", "b@production"):
        a, b = backend("a", 1), backend("b", 7)
        destination = router(a, b).find(model)
        assert (destination.backend, destination.model) == (b, model), model


def test_model_of_a_request_is_known_even_if_it_is_unavailable() -> None:
    two_models = router(backend("a", 1), backend("b"))
    names = ("a", "a@1", "a@99", "b", "b@production", "c", "")
    assert [two_models.served_name(model) for model in names] == ["a", "a", "a", "b", "b", None, None]


def test_all_names_of_all_models_are_listed() -> None:
    names = router(backend("a", 1), backend("b", 7)).names()
    assert names == ("a", "a@1", "a@production", "b", "b@7", "b@production")


def test_other_names_are_rejected() -> None:
    for model in ("", "c", "a@7", "b@1", "A"):
        with pytest.raises(ModelNotFoundError):
            router(backend("a", 1), backend("b", 7)).find(model)


def test_error_says_that_a_model_is_registered_but_not_served() -> None:
    one_model = router(backend("a", 1))
    one_model.registered = ["a", "b"]
    with pytest.raises(ModelNotFoundError, match="registered, but not served") as caught:
        one_model.find("b@3")
    assert "svc add b" in caught.value.todo


def test_removed_model_is_unknown() -> None:
    two_models = router(backend("a", 1), backend("b", 7))
    two_models.remove("b")
    assert two_models.names() == ("a", "a@1", "a@production")
    with pytest.raises(ModelNotFoundError):
        two_models.find("b")


def test_starting_model_is_unavailable_and_not_unknown() -> None:
    with pytest.raises(EngineUnavailableError):
        router(backend("a", 1), backend("b")).find("b")


def test_error_says_that_a_server_has_no_models() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        Router().find("a")
    assert "none yet" in caught.value.expected


def test_version_of_the_only_model_is_known() -> None:
    assert router(backend("a", 3)).only_version == VersionId("a", 3)
    assert router(backend("a")).only_version is None
    assert router(backend("a", 3), backend("b", 1)).only_version is None


@given(st.text(min_size=1), st.floats(0.01, 100), st.floats(0.01, 100))
def test_same_client_goes_to_the_same_backend(who: str, one: float, other: float) -> None:
    first, second = backend("a", 1), backend("a", 2)
    results = []
    for _ in range(2):
        split = Router()
        split.serve("a", [Share(first, one), Share(second, other)])
        results.append(split.find("a", who).backend)
    assert results[0] is results[1]


def test_clients_are_split_by_weight() -> None:
    cases: list[tuple[float, float]] = [(1, 1), (95, 5), (3, 1)]
    for weights in cases:
        backends = backend("a", 1), backend("a", 2)
        split = Router()
        split.serve("a", [Share(*pair) for pair in zip(backends, weights, strict=True)])
        counts = Counter(split.find("a", who).backend is backends[1] for who in CLIENTS)
        expected = len(CLIENTS) * weights[1] / sum(weights)
        assert counts[True] == pytest.approx(expected, abs=4 * (expected * (1 - expected / len(CLIENTS))) ** 0.5), (
            weights
        )


def test_larger_share_keeps_its_clients() -> None:
    """A growing canary takes clients from the others, and loses none."""
    stable, canary = backend("a", 1), backend("a", 2)
    split = Router()
    had: set[str] = set()
    for percent in (5, 25, 100):
        split.serve("a", [Share(canary, percent), Share(stable, 100 - percent)])
        has = {who for who in CLIENTS if split.find("a", who).backend is canary}
        assert had <= has
        had = has
    assert had == set(CLIENTS)


def test_requests_of_unknown_clients_are_split_at_random() -> None:
    drawn = iter([0.0, 0.49, 0.51, 0.99])
    first, second = backend("a", 1), backend("a", 2)
    split = Router(draw=lambda: next(drawn))
    split.serve("a", [Share(first), Share(second)])
    assert [split.find("a").backend is second for _ in range(4)] == [False, False, True, True]


def test_shares_can_be_two_versions_of_one_backend() -> None:
    both = backend("a", 1, 2)
    split = Router()
    split.serve("a", [Share(both, 1, VersionId("a", 1)), Share(both, 1, VersionId("a", 2))])
    assert {split.find("a", who).model for who in CLIENTS} == {"a@1", "a@2"}


def test_named_version_goes_to_a_backend_that_has_loaded_it_whatever_the_weights() -> None:
    first, second = backend("a", 1), backend("a", 2)
    split = Router()
    split.serve("a", [Share(first, 0), Share(second, 1)])
    assert {split.find("a@1", who).backend is first for who in CLIENTS} == {True}


def test_shares_without_a_weight_are_an_error() -> None:
    cases: list[tuple[float, ...]] = [(), (0,), (0, 0), (1, -1)]
    for weights in cases:
        with pytest.raises(ValueError, match="weights"):
            Router().serve("a", [Share(backend("a", 1), weight) for weight in weights])


def test_router_lists_the_versions_of_all_models() -> None:
    served = router(backend("a", 3, 4), backend("b", 7), backend("c"))
    assert served.versions == {VersionId("a", 3), VersionId("a", 4), VersionId("b", 7)}
