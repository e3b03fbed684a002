"""Tests that the server's own requests are paced, low-priority, cancelled by swaps, and harmless."""

import asyncio
import time

import pytest

from serving.background.scheduler import ID_PREFIX, BackgroundScheduler, SupersededError
from svc.dataset.schema.example import Message, Role
from svc.engine.client import Answer, EngineClient
from svc.errors import EngineError
from svc.settings.monitoring import HoldoutSettings
from svc.store.swaps import SwapOutcome
from tests.serving.control import Control, Make, ask, until
from tests.serving.engine_double import Fault
from tests.serving.versions import NAME, target

pytestmark = pytest.mark.slow

PROMPT = [Message(Role.USER, "one two three")]


def questions(control: Control, **settings: float) -> BackgroundScheduler:
    fast = {"requests_per_minute": 1e6} | settings
    return BackgroundScheduler(control.admission, control.pool, HoldoutSettings.model_validate(fast))


async def put(client: EngineClient) -> Answer:
    return await client.chat(PROMPT, max_tokens=2)


async def test_background_request_is_answered_by_the_engine_and_not_counted_in_metrics(control: Control) -> None:
    answer = await questions(control).ask(control.replica.weights, put)
    assert answer.text == "1.0 1.1 "
    assert control.sample("svc_requests_running", model=NAME) == 0
    families = [family for family in control.collector.collect() if family.name in ("svc_requests", "svc_tokens")]
    assert [family.samples for family in families] == [[], []]


async def test_background_request_ids_have_their_own_prefix(control: Control) -> None:
    before = len(control.double.request_ids)
    await questions(control).ask(control.replica.weights, put)
    (own,) = control.double.request_ids[before:]
    assert own.startswith(ID_PREFIX)
    assert len(own) > len(ID_PREFIX)


async def test_background_requests_do_not_exceed_the_configured_rate(control: Control) -> None:
    asking = questions(control, requests_per_minute=60 / 0.1)
    began = time.monotonic()
    for _ in range(3):
        await asking.ask(control.replica.weights, put)
    assert 0.2 <= time.monotonic() - began < 1


async def test_scheduled_background_requests_run_one_at_a_time(control: Control) -> None:
    asking, most = questions(control), 0
    control.double.token_delay_s = 0.01

    def watch(path: str) -> None:
        nonlocal most
        if path != "/health":
            most = max(most, control.double.running)

    control.double.on_call = watch
    await asyncio.gather(*(asking.ask(control.replica.weights, put) for _ in range(4)))
    assert most == 0  # no arriving request found another one running


async def test_error_is_raised_if_the_engine_rejects_a_background_request(control: Control) -> None:
    control.double.max_model_len = 2
    with pytest.raises(EngineError, match="maximum context length"):
        await questions(control).ask(control.replica.weights, put)


async def test_background_request_is_not_sent_if_engine_weights_changed(control: Control) -> None:
    load = control.replica.weights
    await control.promote(2)
    calls = len(control.double.requests)
    with pytest.raises(SupersededError):
        await questions(control).ask(load, put)
    assert len(control.double.requests) == calls


async def test_swap_cancels_a_background_request_without_waiting_for_its_answer(control: Control) -> None:
    control.double.token_delay_s = 30
    asking = asyncio.create_task(questions(control).ask(control.replica.weights, put))
    await until(lambda: control.double.delayed)
    control.double.token_delay_s = 0
    swap = await control.promote(2)
    assert (swap.outcome, swap.running) == (SwapOutcome.SUCCEEDED, 0)
    assert swap.queued_s is not None and swap.queued_s < 2
    with pytest.raises(SupersededError):
        await asking


async def test_background_request_is_resent_if_the_swap_was_cancelled(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.background.scheduler.PATIENCE_S", 0.0)
    async with make(drain_timeout_s=0.2).run() as control, control.client() as client:
        control.park.room = "full"
        control.double.token_delay_s = 0.2
        running = asyncio.create_task(ask(client, stream=False))
        await until(lambda: control.double.running)
        asking = asyncio.create_task(questions(control).ask(control.replica.weights, put))
        await until(lambda: control.double.running == 2)
        assert (await control.promote(2)).outcome is SwapOutcome.REFUSED
        assert (await asking).text == "1.0 1.1 "
        assert control.double.cancelled == 1
        assert (await running).status == 200


async def test_background_request_raises_superseded_error_if_the_engine_died(control: Control) -> None:
    control.double.fault = Fault.DIE_BEFORE_ANSWER
    asking = questions(control)
    with pytest.raises(SupersededError):
        await asking.ask(control.replica.weights, put)
    await control.serves(target(1))
    assert (await asking.ask(control.replica.weights, put)).text == "1.0 1.1 "


async def test_background_request_is_resent_if_the_engine_was_only_slow(control: Control) -> None:
    asking = questions(control)
    for _ in range(3):
        tries, late = 0, 3

        async def fail_once(client: EngineClient) -> Answer:
            nonlocal tries
            tries += 1
            if tries == 1:
                monkey.setattr(EngineClient, "healthy", healthy)
                raise EngineError("no answer from the engine to /tokenize: timeout")
            return await put(client)

        async def healthy(self: EngineClient) -> bool:
            nonlocal late
            late -= 1
            return late < 0

        with pytest.MonkeyPatch.context() as monkey:
            answer = await asking.ask(control.replica.weights, fail_once)
        assert (answer.text, tries) == ("1.0 1.1 ", 2)
    assert asking.off is None


async def test_swap_on_a_slow_engine_is_not_logged_as_engine_death(
    control: Control, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checks = 0

    async def fail(client: EngineClient) -> Answer:
        monkeypatch.setattr(EngineClient, "healthy", unhealthy)
        raise EngineError("no answer from the engine to /tokenize: timeout")

    async def unhealthy(self: EngineClient) -> bool:
        nonlocal checks
        checks += 1
        return False

    asking = asyncio.create_task(questions(control).ask(control.replica.weights, fail))
    await until(lambda: checks > 1)
    assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
    with pytest.raises(SupersededError):
        await asking
    assert "died" not in caplog.text


async def test_no_more_background_requests_are_sent_after_three_engine_deaths(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async with make().run() as control:
        asking = questions(control)
        for _ in range(3):
            await control.serves(target(1))
            control.double.fault = Fault.DIE_BEFORE_ANSWER
            with pytest.raises(SupersededError):
                await asking.ask(control.replica.weights, put)
        await control.serves(target(1))
        with pytest.raises(SupersededError):
            await asking.ask(control.replica.weights, put)
    assert asking.off is not None
    assert "died 3 times in a day" in asking.off
    assert caplog.text.count("stopping background requests") == 1


async def test_engine_deaths_on_earlier_days_do_not_count_towards_the_limit(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.background.scheduler._DEATHS_WITHIN_S", 0.3)
    async with make().run() as control:
        asking = questions(control)
        for death in range(4):
            await control.serves(target(1))
            control.double.fault = Fault.DIE_BEFORE_ANSWER
            with pytest.raises(SupersededError):
                await asking.ask(control.replica.weights, put)
            if death == 1:
                await asyncio.sleep(0.3)
        await control.serves(target(1))
        assert (await asking.ask(control.replica.weights, put)).text == "1.0 1.1 "


async def test_cancelled_background_request_is_aborted_on_the_engine(control: Control) -> None:
    control.double.token_delay_s = 30
    asking = asyncio.create_task(questions(control).ask(control.replica.weights, put))
    await until(lambda: control.double.running)
    asking.cancel()
    await asyncio.wait([asking], timeout=1)
    assert asking.cancelled()
    await until(lambda: not control.double.running)
    await control.replica.drained(0.1)
