"""Tests promotions, engine deaths and restarts under load, from the clients' point of view."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from serving.rollout import reconciler as reconciler_module
from svc.engine.state import EngineState
from svc.errors import EngineError, SwapError
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.registry import Registry
from svc.store.desired import change_desired, read_desired
from svc.store.swaps import SwapOutcome, SwapResult, begin_swap, find_swap
from svc.version import Alias, Target, VersionId
from tests.serving.control import Control, Load, Make, ask, until
from tests.serving.engine_double import DEAD_MESSAGE, EngineDouble
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

ONE, TWO, THREE = (VersionId(NAME, number) for number in (1, 2, 3))


def slow(double: EngineDouble) -> None:
    double.token_delay_s, double.reload_delay_s = 0.01, 0.05


def slower(double: EngineDouble) -> None:
    double.token_delay_s, double.reload_delay_s = 0.06, 0.05


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)], ids=["promotion", "rollback"])
async def test_no_request_fails_and_no_answer_mixes_versions_during_a_swap_under_load(
    make: Make, before: int, after: int
) -> None:
    control = make()
    control.park.prepare = slower
    async with control.run(), control.client() as client:
        if before != 1:
            await control.promote(before)
        load = Load(client)
        async with load.run(streams=8, plain=4):
            await until(lambda: control.double.running == 12)
            swap = await control.promote(after)
            await until(lambda: load.versions[f"{NAME}@{after}"] > 12)
    load.check()
    assert swap.outcome is SwapOutcome.SUCCEEDED
    assert swap.running is not None and swap.running >= 6
    assert swap.queued is not None and swap.queued >= 6
    assert set(load.versions) == {f"{NAME}@{before}", f"{NAME}@{after}"}
    assert control.desired().target == target(after) and control.desired().previous == target(before)


async def test_queued_request_is_answered_by_the_new_version_after_a_swap(make: Make) -> None:
    control = make()
    control.park.prepare = slow
    async with control.run(), control.client() as client:
        wish = control.wish(2)
        await until(lambda: control.state is EngineState.SWAPPING)
        answers = await asyncio.gather(*(ask(client, stream=stream) for stream in (True, False)))
        assert (await control.outcome(wish)).queued == 2
    assert [answer.version for answer in answers] == [str(TWO)] * 2
    assert [answer.words for answer in answers] == [{"2"}] * 2


async def test_request_admitted_just_as_a_drain_begins_is_answered(
    control: Control,
) -> None:
    async with control.client() as client:
        async with control.admission.changing():
            control.replica.enter(EngineState.DRAINING)
            asking = asyncio.create_task(ask(client, stream=False))
            await until(lambda: control.admission.queued)
            control.replica.enter(EngineState.READY)
        async with control.admission.changing():
            control.replica.enter(EngineState.DRAINING)
            await until(lambda: control.admission.queued)
            assert control.admission.running == 0
            control.replica.enter(EngineState.READY)
        assert (await asking).status == 200


async def test_production_alias_moves_only_after_a_successful_swap(make: Make) -> None:
    control = make()
    make_version(control.registry, 4, probes_of="/elsewhere")
    async with control.run():
        await control.promote(4)
        await until(lambda: control.book.book == {Alias.PRODUCTION: ONE})
        moved = list[VersionId]()
        control.double.on_call = lambda path: moved.extend(
            control.book.book.values() if path == "/v1/completions" else ()
        )
        await control.promote(2)
        assert set(moved) == {ONE}
        assert control.book.book == {Alias.PRODUCTION: TWO}


async def test_rollback_returns_to_the_previous_version(control: Control) -> None:
    await control.promote(2)
    previous = control.desired().previous
    assert previous is not None
    swap = await control.promote(previous.version.number)
    assert swap.outcome is SwapOutcome.SUCCEEDED
    async with control.client() as client:
        assert (await ask(client, stream=False)).words == {"1"}
    assert control.desired().previous == target(2)
    assert control.book.book == {Alias.PRODUCTION: ONE}


async def test_served_version_is_in_the_metrics(control: Control) -> None:
    await control.promote(2)
    assert control.sample("svc_model_version_info", model=NAME, version="2", format="merged") == 1
    assert control.sample("svc_swaps_total", model=NAME, outcome="succeeded") == 1
    assert control.sample("svc_engine_state", model=NAME, state="ready") == 1


async def test_refused_promotion_restores_the_desired_version_and_reports_the_reason(control: Control) -> None:
    weights = control.registry.folder(TWO) / "merged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    before = control.desired()
    swap = await control.promote(2)
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "was changed after registration" in swap.reason
    after = control.desired()
    assert (after.target, after.previous) == (before.target, before.previous)
    assert control.reconciler.last_error == swap.reason
    assert control.state is EngineState.READY


async def test_swap_failure_is_reported_after_the_desired_version_is_restored(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_version(control.registry, 4, width=8)
    control.park.room = "full"
    wished, journal = list[Target](), control.reconciler.journal
    end = journal.end

    def told(swap_id: int, result: SwapResult) -> None:
        wished.append(control.desired().target)
        end(swap_id, result)

    monkeypatch.setattr(journal, "end", told)
    await control.promote(4)
    assert wished == [target(1)]


async def test_dead_engine_is_in_failed_state_until_restarted(control: Control) -> None:
    control.reconciler.reviver.backoff_s = (10.0,)
    control.park.engines[0].kill()
    await until(lambda: control.admission.unavailable_reason)
    assert control.state is EngineState.FAILED


async def test_no_swap_runs_if_the_version_is_already_served(control: Control) -> None:
    calls = len(control.double.calls)
    swap = await control.promote(1)
    assert (swap.outcome, swap.queued_s) == (SwapOutcome.SUCCEEDED, None)
    assert "/collective_rpc" not in control.double.calls[calls:]
    assert control.desired().previous is None


async def test_rollback_never_targets_a_version_that_was_never_served(make: Make) -> None:
    control = make()
    control.park.prepare = slow
    make_version(control.registry, 4, probes_of="/elsewhere")
    async with control.run():
        first = control.wish(4)
        await until(lambda: control.state is EngineState.SWAPPING)
        second = control.wish(3)
        assert (await control.outcome(first)).outcome is SwapOutcome.CANCELLED
        assert (await control.outcome(second)).outcome is SwapOutcome.SUCCEEDED
        await until(lambda: control.desired().previous == target(1))
        assert control.desired().target == target(3)


async def test_dead_engine_is_restarted_while_clients_get_503(make: Make) -> None:
    control = make()
    control.park.prepare = slow
    async with control.run(), control.client() as client:
        plain = asyncio.create_task(ask(client, stream=False))
        stream = asyncio.create_task(ask(client, stream=True))
        await until(lambda: control.double.running == 2)
        await asyncio.sleep(0.02)
        control.park.engines[0].kill()
        assert (await plain).status == 503
        assert (await stream).error == "engine_died"
        await control.serves(target(1))
        assert (await ask(client, stream=True)).words == {"1"}
    assert len(control.park.engines) == 2
    assert control.pool.restarts == 1
    assert control.sample("svc_engine_restarts_total", model=NAME) == 1
    assert control.reconciler.last_error is not None and "replica 0 died" in control.reconciler.last_error


async def test_engine_restart_is_retried_if_it_fails(control: Control) -> None:
    control.park.failing_starts = 3
    seen = set[EngineState]()
    starts = list[float]()
    control.park.prepare = lambda double: starts.append(time.monotonic())
    control.park.engines[0].kill()
    async with control.client() as client, asyncio.timeout(5):
        while control.state is not EngineState.READY or len(control.park.engines) < 2:
            seen.add(control.state)
            answer = await ask(client, stream=False)
            assert answer.status in (200, 503)
            await asyncio.sleep(0)
    assert EngineState.FAILED in seen
    assert control.pool.restarts == 4
    assert starts[2] - starts[1] >= 0.05


async def test_engine_stays_in_service_if_an_error_merely_quotes_the_message_of_a_dead_engine(control: Control) -> None:
    """vLLM quotes the death message when a client sends that message as a value."""
    for status in (400, 422, 500):
        control.double.refuse_with = status, {"message": f"Input should be a valid number, got '{DEAD_MESSAGE}'"}
        async with control.client() as client:
            for _ in range(5):
                assert (await ask(client, stream=False)).status in (400, 422, 502), status
                assert not control.pool.members[0].watch.suspected, status
        assert len(control.park.engines) == 1, status


async def test_unresponsive_engine_is_replaced(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.engine_watch._UNHEALTHY_S", 0.1)
    first = control.park.engines[0]
    assert first.server is not None
    first.server.kill()
    await until(lambda: len(control.park.engines) == 2 and control.state is EngineState.READY)
    assert not first.alive


async def test_new_version_can_be_promoted_while_the_engine_fails_to_restart(control: Control) -> None:
    weights = control.registry.folder(ONE) / "merged" / "model.safetensors"
    weights.write_bytes(b"damaged")
    control.park.engines[0].kill()
    await until(lambda: control.pool.restarts >= 2)
    swap = await control.promote(2)
    assert swap.outcome is SwapOutcome.SUCCEEDED
    await control.serves(target(2))
    async with control.client() as client:
        assert (await ask(client, stream=False)).words == {"2"}
    assert control.book.book == {Alias.PRODUCTION: TWO}


async def test_previous_version_stays_desired_if_a_promotion_fails_while_the_engine_is_dead(
    control: Control,
) -> None:
    make_version(control.registry, 4, probes_of="/elsewhere")
    control.park.failing_starts = 2
    control.park.engines[0].kill()
    await until(lambda: control.state is EngineState.FAILED)
    swap = await control.promote(4)
    assert swap.outcome is SwapOutcome.FAILED
    await control.serves(target(1))
    assert control.desired().target == target(1)


async def test_serving_continues_if_mlflow_is_down(make: Make) -> None:
    control = make()
    control.book.failures = 3
    async with control.run():
        control.book.failures = 2
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
        assert control.book.book == {Alias.PRODUCTION: TWO}


async def test_unresponsive_mlflow_does_not_delay_startup(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    control = make()

    async def hang(name: str) -> None:
        await asyncio.sleep(10)

    monkeypatch.setattr(control.alias, "read", hang)
    async with asyncio.timeout(5):
        await control.reconciler.start()
    assert control.state is EngineState.READY
    await control.replica.stop()


async def test_serving_continues_if_the_store_is_down(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    away = True

    def read_or_fail(*arguments: Any) -> Any:
        if away:
            raise OperationalError("select", {}, Exception("disk I/O error"))
        return read_desired(*arguments)

    monkeypatch.setattr(reconciler_module, "read_desired", read_or_fail)
    await asyncio.sleep(0.05)
    control.park.engines[0].kill()
    await until(lambda: len(control.park.engines) == 2 and control.state is EngineState.READY)
    away = False
    assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED


async def test_failed_promotion_is_not_retried_if_resetting_the_desired_version_fails_at_first(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_version(control.registry, 4, probes_of="/elsewhere")
    failures = 2

    def change_or_fail(*arguments: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise OperationalError("update", {}, Exception("database is locked"))
        return change_desired(*arguments)

    monkeypatch.setattr(reconciler_module, "change_desired", change_or_fail)
    assert (await control.promote(4)).outcome is SwapOutcome.RESTORED
    await until(lambda: control.desired().target == target(1))
    assert control.double.calls.count("/collective_rpc") == 2


async def test_swap_does_not_wait_for_a_slow_journal(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    monkeypatch.setattr("serving.rollout.journal.add_step", lambda *_: written.wait(5))
    wish = control.wish(2)
    try:
        await control.serves(target(2), timeout_s=3)
    finally:
        written.set()
    assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED


@pytest.mark.parametrize("number", [2, 4])
async def test_no_disk_io_happens_on_the_event_loop(
    control: Control, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    make_version(control.registry, 4, probes_of="/elsewhere", fingerprint=False)
    threads = set[str]()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*arguments: Any) -> Any:
            threads.add(threading.current_thread().name)
            return function(*arguments)

        return watch

    event.listen(control.store, "before_cursor_execute", watched(lambda *_: None))
    for name in ("manifest", "verify"):
        monkeypatch.setattr(Registry, name, watched(getattr(Registry, name)))
    monkeypatch.setattr("serving.rollout.swap_plan.compatibility_fingerprint", watched(compatibility_fingerprint))
    monkeypatch.setattr(control.book, "set_alias", watched(control.book.set_alias))
    wish = await asyncio.to_thread(control.wish, number)
    async with asyncio.timeout(5):
        while True:
            swap = await asyncio.to_thread(find_swap, control.store, NAME, wish.generation)
            if swap and swap.result:
                break
            await asyncio.sleep(0.01)
    assert len(threads) > 1
    assert threading.current_thread().name not in threads


async def test_restarted_server_serves_the_desired_version(make: Make) -> None:
    control = make()
    async with control.run():
        await control.promote(2)
    control.assemble()
    async with control.run():
        assert control.reconciler.actual.target == target(2)
        assert Path(control.double.weights).parent.name == "2"


async def test_promotion_made_without_a_running_server_is_carried_out_at_startup(make: Make) -> None:
    control = make()
    async with control.run():
        pass
    wish = control.wish(2)
    control.assemble()
    async with control.run():
        assert control.reconciler.actual == wish
        await until(lambda: control.book.book == {Alias.PRODUCTION: TWO})


async def test_interrupted_swap_is_completed_at_the_next_startup(make: Make) -> None:
    control = make()
    async with control.run():
        pass
    wish = control.wish(2)
    begin_swap(control.store, wish)
    control.assemble()
    async with control.run():
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED


async def test_interrupted_swap_fails_if_another_version_is_now_desired(make: Make) -> None:
    control = make()
    async with control.run():
        pass
    wish = control.wish(2)
    begin_swap(control.store, wish)
    change_desired(control.store, wish, target(3), wish.previous)
    control.assemble()
    async with control.run():
        assert (await control.outcome(wish)).outcome is SwapOutcome.FAILED


async def test_previous_version_becomes_desired_if_a_new_version_fails_at_startup(make: Make) -> None:
    control = make()
    make_version(control.registry, 4, probes_of="/elsewhere")
    async with control.run():
        await until(lambda: control.book.book == {Alias.PRODUCTION: ONE})
    wish = control.wish(4)
    begin_swap(control.store, wish)
    control.assemble()
    with pytest.raises(SwapError, match="tuned@4"):
        await control.reconciler.start()
    assert control.park.alive == 0
    assert (await control.outcome(wish)).outcome is SwapOutcome.FAILED
    control.assemble()
    async with control.run():
        assert control.reconciler.actual.target == target(1)


async def test_failed_startup_does_not_wait_for_mlflow(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.rollout.reconciler._ALIAS_WAIT_S", 0.05)

    async def silent(name: str) -> VersionId | None:
        await asyncio.sleep(60)
        return None

    control = make()
    control.park.failing_starts = 1
    monkeypatch.setattr(control.alias, "read", silent)
    async with asyncio.timeout(5):
        with pytest.raises(EngineError, match="no memory"):
            await control.reconciler.start()


async def test_previously_served_version_stays_desired_if_the_engine_fails_to_start(make: Make) -> None:
    control = make()
    async with control.run():
        await control.promote(2)
    control.assemble()
    control.park.failing_starts = 1
    with pytest.raises(EngineError, match="no memory"):
        await control.reconciler.start()
    assert control.state is EngineState.FAILED
    assert control.desired().target == target(2)
    assert find_swap(control.store, NAME) is not None
