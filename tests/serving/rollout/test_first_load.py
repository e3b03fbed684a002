"""A version that this kind of engine has never loaded comes by an engine that starts with it."""

from collections.abc import Callable

import pytest
from sqlalchemy.exc import OperationalError

from serving.replicas.verification import Verification
from svc.engine.state import EngineState
from svc.settings import SwapChoice
from svc.store.retaken_probes import find_retaken_probes
from svc.store.swaps import SwapKind, SwapOutcome
from tests.serving.control import Control, Make, ask, until
from tests.serving.versions import NAME, OTHER_FACTS, target

TWO = f"{NAME}@2"
RELOAD = "/collective_rpc"
FULL = "it needs 2 GiB, 1 GiB is free"
Elsewhere = Callable[..., Control]


@pytest.fixture
def elsewhere(make: Make) -> Elsewhere:
    """Makes a server whose engines are of another kind than those that qualified the versions."""
    return lambda **settings: make(facts=OTHER_FACTS, **settings)


def reloads(control: Control) -> int:
    return sum(engine.double.calls.count(RELOAD) for engine in control.park.engines)


async def test_where_there_is_room_a_second_engine_starts_with_it(elsewhere: Elsewhere) -> None:
    async with elsewhere().run() as control:
        swap = await control.promote(2)
        assert (swap.outcome, swap.kind, reloads(control)) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN, 0)


async def test_without_room_the_only_engine_starts_again_with_it(elsewhere: Elsewhere) -> None:
    async with elsewhere().run() as control:
        control.park.room = FULL
        swap = await control.promote(2)
        assert (swap.outcome, swap.kind, reloads(control)) == (SwapOutcome.SUCCEEDED, SwapKind.INPLACE, 0)
        assert [engine.alive for engine in control.park.engines] == [False, True]


async def test_requests_wait_while_the_only_engine_starts_again(elsewhere: Elsewhere) -> None:
    control = elsewhere()
    control.park.room = FULL
    async with control.run(), control.client() as client:
        control.park.start_delay_s = 0.3
        control.wish(2)
        await until(lambda: control.state is EngineState.STARTING)
        answer = await ask(client, stream=False)
        assert (answer.status, answer.version) == (200, TWO)


async def test_the_journal_says_why_an_engine_is_started(elsewhere: Elsewhere) -> None:
    async with elsewhere().run() as control:
        control.park.room = FULL
        await control.promote(2)
        text = "\n".join(control.steps)
        for part in ("no probes of this kind of engine", FULL, f"starting the engine again, with {target(2)}"):
            assert part in text
        assert "probes taken again" in text


async def test_its_probes_are_kept_and_the_next_time_it_is_reloaded(elsewhere: Elsewhere) -> None:
    async with elsewhere().run() as control:
        control.park.room = FULL
        await control.promote(2)
        assert find_retaken_probes(control.store, target(2), OTHER_FACTS) is not None
        await control.promote(1)
        assert (await control.promote(2)).kind is SwapKind.INPLACE
        assert reloads(control) == 2


async def test_of_several_engines_one_starts_with_it_and_the_others_are_reloaded(elsewhere: Elsewhere) -> None:
    async with elsewhere(replicas=2).run() as control:
        await until(lambda: len(control.pool.ready) == 2)
        control.park.room = FULL
        swap = await control.promote(2)
        assert (swap.outcome, swap.kind, reloads(control)) == (SwapOutcome.SUCCEEDED, SwapKind.ROLLING, 1)
        assert len(control.park.engines) == 3


async def test_an_engine_that_does_not_start_with_it_starts_with_the_version_before(elsewhere: Elsewhere) -> None:
    async with elsewhere().run() as control:
        control.park.room = FULL
        control.park.failing_starts = 1
        swap = await control.promote(2)
        assert swap.outcome is SwapOutcome.FAILED
        assert swap.reason is not None and "no memory" in swap.reason
        await control.serves(target(1))


async def test_where_a_second_engine_is_set_the_only_one_is_not_started_again(elsewhere: Elsewhere) -> None:
    async with elsewhere(swap=SwapChoice.BLUEGREEN).run() as control:
        control.park.room = FULL
        assert (await control.promote(2)).outcome is SwapOutcome.REFUSED
        assert len(control.park.engines) == 1


async def test_where_the_store_cannot_say_no_engine_is_touched(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("disk I/O error"))

    async with elsewhere().run() as control:
        monkeypatch.setattr("serving.replicas.verification.find_retaken_probes", away)
        swap = await control.reconciler.swap.run(target(1), target(2), lambda step: None)
        assert swap.outcome is SwapOutcome.REFUSED
        assert (control.state, len(control.park.engines), reloads(control)) == (EngineState.READY, 1, 0)


async def test_a_reload_without_probes_is_taken_back(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    async def has_probes(verification: Verification, wanted: object) -> bool:
        return True

    async with elsewhere().run() as control:
        monkeypatch.setattr(Verification, "has_probes", has_probes)
        assert (await control.promote(2)).outcome is SwapOutcome.RESTORED
        assert find_retaken_probes(control.store, target(2), OTHER_FACTS) is None
        await control.serves(target(1))


async def test_an_engine_of_an_earlier_server_is_no_first_load(make: Make) -> None:
    control = make()
    control.leaves = True
    async with control.run():
        pass
    (left,) = control.park.left.values()
    control.park.facts, control.leaves = OTHER_FACTS, False
    control.assemble()
    async with control.run():
        assert not left.alive
        assert len(control.park.engines) == 3  # the first, the same as it is adopted, and the one that is started
        await control.serves(target(1))
