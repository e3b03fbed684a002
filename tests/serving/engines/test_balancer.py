"""Tests of which engine answers a request."""

import sys
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engines.balancer import Balancer
from serving.engines.model_names import ModelNames
from serving.engines.pool import EnginePool
from svc.version import Format, Target, VersionId

ONE = Target(VersionId("m", 1), Format.MERGED)


def engine(number: int, running: int = 0) -> Any:
    """Return the parts of an engine that the balancer reads."""
    return SimpleNamespace(
        replica=number,
        running=running,
        reserved=0,
        adapters=None,
        watch=SimpleNamespace(suspected=False),
        serves=lambda _: ONE,
        http=object(),
    )


def balancer(engines: Sequence[Any]) -> Balancer:
    names = ModelNames("m")
    names.serve(ONE)
    return Balancer(cast(EnginePool, SimpleNamespace(ready_for=lambda _: engines)), names)


def chosen(engines: Sequence[Any], who: str = "") -> int:
    """Return the number of the engine that answers."""
    return balancer(engines).choose("m", who)[0].replica


def test_request_from_an_unknown_client_goes_to_the_engine_with_the_fewest_requests() -> None:
    assert chosen([engine(0, 3), engine(1, 1), engine(2, 2)]) == 1


def test_conversation_stays_with_its_engine_while_other_engines_are_slightly_less_busy() -> None:
    who = "How do I return a parcel?"
    home = chosen([engine(0), engine(1), engine(2)], who)
    assert chosen([engine(each, 4 if each == home else 3) for each in range(3)], who) == home


def test_conversation_always_falls_back_to_the_same_engine_when_its_own_is_busy() -> None:
    who = "How do I return a parcel?"
    home = chosen([engine(0), engine(1), engine(2)], who)
    busy = [engine(each, 9 if each == home else 3) for each in range(3)]
    assert chosen(busy, who) == chosen([each for each in busy if each.replica != home], who) != home


def test_no_conversation_moves_between_existing_engines_when_an_engine_is_added() -> None:
    three, four = [engine(0), engine(1), engine(2)], [engine(0), engine(1), engine(2), engine(3)]
    moved = [who for who in map(str, range(400)) if chosen(three, who) != (new := chosen(four, who)) and new != 3]
    assert moved == []


def test_conversations_are_spread_evenly_across_engines() -> None:
    counts = Counter(chosen([engine(0), engine(1), engine(2), engine(3)], f"question {each}") for each in range(2000))
    assert all(400 < count < 600 for count in counts.values())


@pytest.mark.parametrize("who", ["", "a client"])
def test_cost_of_choosing_an_engine_does_not_grow_with_the_number_of_replicas(who: str) -> None:
    def calls(replicas: int) -> int:
        of_model, counted = balancer([engine(number) for number in range(replicas)]), list[str]()
        of_model.choose("m", who)  # fills caches
        sys.setprofile(lambda frame, event, _: counted.append(event))
        try:
            of_model.choose("m", who)
        finally:
            sys.setprofile(None)
        return counted.count("call")

    assert calls(20) == calls(3)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20), st.text(min_size=1))
def test_conversation_affinity_never_raises_engine_load_above_125_percent_of_the_mean_load(
    running: list[int], who: str
) -> None:
    number = chosen([engine(each, load) for each, load in enumerate(running)], who)
    assert running[number] < 1.25 * (sum(running) + 1) / len(running) + 1e-9
