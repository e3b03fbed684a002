"""Tests that a version never loaded by this engine kind needs an engine that starts with it."""

from collections.abc import Callable

import pytest
from sqlalchemy.exc import OperationalError

from serving.engines.verification import Verification, find_retaken_probes
from svc.engine.state import EngineState
from svc.settings.serve import SwapChoice
from svc.store.swaps import SwapKind, SwapOutcome
from tests.serving.control import Control, Make, ask, until
from tests.serving.versions import NAME, OTHER_FACTS, target

pytestmark = pytest.mark.slow

TWO = f"{NAME}@2"
RELOAD = "/collective_rpc"
FULL = "it needs 2 GiB, 1 GiB is free"
Elsewhere = Callable[..., Control]


@pytest.fixture
def elsewhere(make: Make) -> Elsewhere:
    """Return a function that creates a server whose engines differ from those that qualified the versions."""
    return lambda **settings: make(facts=OTHER_FACTS, **settings)


def reloads(control: Control) -> int:
    return sum(engine.double.calls.count(RELOAD) for engine in control.park.engines)


async def test_second_engine_starts_with_the_new_version_if_memory_suffices(elsewhere: Elsewhere) -> None:
    async with elsewhere().run() as control:
        swap = await control.promote(2)
        assert (swap.outcome, swap.kind, reloads(control)) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN, 0)


async def test_single_engine_is_restarted_with_the_new_version_if_memory_is_insufficient(elsewhere: Elsewhere) -> None:
    async with elsewhere().run() as control:
        control.park.room = FULL
        swap = await control.promote(2)
        assert (swap.outcome, swap.kind, reloads(control)) == (SwapOutcome.SUCCEEDED, SwapKind.INPLACE, 0)
        assert [engine.alive for engine in control.park.engines] == [False, True]


async def test_requests_wait_while_a_single_engine_restarts(elsewhere: Elsewhere) -> None:
    control = elsewhere()
    control.park.room = FULL
    async with control.run(), control.client() as client:
        control.park.start_delay_s = 0.3
        control.wish(2)
        await until(lambda: control.state is EngineState.STARTING)
        answer = await ask(client, stream=False)
        assert (answer.status, answer.version) == (200, TWO)


async def test_journal_shows_why_an_engine_is_started(elsewhere: Elsewhere) -> None:
    async with elsewhere().run() as control:
        control.park.room = FULL
        await control.promote(2)
        text = "\n".join(control.steps)
        for part in ("no probes from this kind of engine", FULL, f"restarting the engine with {target(2)}"):
            assert part in text
        assert "probes recorded again" in text


async def test_first_load_stores_probes_and_the_next_swap_to_that_version_happens_in_place(
    elsewhere: Elsewhere,
) -> None:
    async with elsewhere().run() as control:
        control.park.room = FULL
        await control.promote(2)
        assert find_retaken_probes(control.store, target(2), OTHER_FACTS) is not None
        await control.promote(1)
        assert (await control.promote(2)).kind is SwapKind.INPLACE
        assert reloads(control) == 2


async def test_loading_a_version_for_the_first_time_starts_one_engine_and_reloads_the_others(
    elsewhere: Elsewhere,
) -> None:
    async with elsewhere(replicas=2).run() as control:
        await until(lambda: len(control.pool.ready) == 2)
        control.park.room = FULL
        swap = await control.promote(2)
        assert (swap.outcome, swap.kind, reloads(control)) == (SwapOutcome.SUCCEEDED, SwapKind.ROLLING, 1)
        assert len(control.park.engines) == 3


async def test_previous_version_is_restored_if_the_engine_does_not_start_with_the_new_version(
    elsewhere: Elsewhere,
) -> None:
    async with elsewhere().run() as control:
        control.park.room = FULL
        control.park.failing_starts = 1
        swap = await control.promote(2)
        assert swap.outcome is SwapOutcome.FAILED
        assert swap.reason is not None and "no memory" in swap.reason
        await control.serves(target(1))


async def test_blue_green_promotion_is_refused_if_memory_suffices_for_only_one_engine(elsewhere: Elsewhere) -> None:
    async with elsewhere(swap=SwapChoice.BLUEGREEN).run() as control:
        control.park.room = FULL
        assert (await control.promote(2)).outcome is SwapOutcome.REFUSED
        assert len(control.park.engines) == 1


async def test_engines_are_unchanged_if_the_store_is_unreadable(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("disk I/O error"))

    async with elsewhere().run() as control:
        monkeypatch.setattr("serving.engines.verification.find_retaken_probes", away)
        swap = await control.reconciler.swap.run(target(1), target(2), lambda step: None)
        assert swap.outcome is SwapOutcome.REFUSED
        assert (control.state, len(control.park.engines), reloads(control)) == (EngineState.READY, 1, 0)


async def test_reload_is_undone_if_the_version_has_no_verification_probes(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def has_probes(verification: Verification, wanted: object) -> bool:
        return True

    async with elsewhere().run() as control:
        monkeypatch.setattr(Verification, "has_probes", has_probes)
        assert (await control.promote(2)).outcome is SwapOutcome.RESTORED
        assert find_retaken_probes(control.store, target(2), OTHER_FACTS) is None
        await control.serves(target(1))


async def test_adopted_engine_is_replaced_if_no_engine_of_its_kind_has_run_the_version(make: Make) -> None:
    control = make()
    control.leaves = True
    async with control.run():
        pass
    (left,) = control.park.left.values()
    control.park.facts, control.leaves = OTHER_FACTS, False
    control.assemble()
    async with control.run():
        assert not left.alive
        assert len(control.park.engines) == 3  # the first, the same after its adoption, and the new one
        await control.serves(target(1))
