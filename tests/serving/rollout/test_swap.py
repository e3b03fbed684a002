"""Tests failures of the in-place swap: the responses to requests, and the state afterwards."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from svc.engine.client import Health
from svc.engine.state import EngineState
from svc.errors import EngineError, NotFoundError
from svc.store.swaps import SwapOutcome
from svc.version import Format
from tests.serving.control import Answer, Control, Load, Make, ask, until
from tests.serving.engine_double import EngineDouble
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

ONE = f"{NAME}@1"
RELOAD, RESET, PROBE = "/collective_rpc", "/reset_prefix_cache", "/v1/completions"


def slow(double: EngineDouble) -> None:
    double.token_delay_s, double.reload_delay_s = 0.02, 0.05


def dies_at(path: str, nth: int = 1) -> Callable[[EngineDouble], None]:
    """Return a function that kills an engine at the nth request for a path while weights are replaced."""

    def prepare(double: EngineDouble) -> None:
        slow(double)
        count = 0

        def on_call(called: str) -> None:
            nonlocal count
            count += called == path
            if count == nth:
                double.die()

        double.on_call = on_call

    return prepare


def first_only(prepare: Callable[[EngineDouble], None]) -> Callable[[EngineDouble], None]:
    """Return a function that prepares only the first engine and leaves later engines intact."""
    prepared = list[EngineDouble]()

    def prepare_first(double: EngineDouble) -> None:
        (slow if prepared else prepare)(double)
        prepared.append(double)

    return prepare_first


async def swap_under_load(control: Control, number: int) -> tuple[Load, SwapOutcome | None, str | None]:
    """Promote a version while clients send requests, and return the load and the swap's outcome and reason."""
    async with control.client() as client:
        load = Load(client)
        async with load.run():
            await until(lambda: load.answers)
            swap = await control.promote(number)
            answered = len(load.answers)
            await until(lambda: len(load.answers) > answered + 9)
    return load, swap.outcome, swap.reason


async def test_admission_stays_open_if_a_version_file_was_altered(control: Control) -> None:
    weights = control.registry.folder(target(2).version) / "merged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"?")
    calls = len(control.double.calls)
    swap = await control.reconciler.swap.run(target(1), target(2), lambda step: None)
    assert swap.outcome is SwapOutcome.REFUSED
    assert (swap.queued_s, swap.queued) == (None, None)
    assert not {RELOAD, RESET, PROBE} & set(control.double.calls[calls:])
    assert control.state is EngineState.READY


@pytest.mark.parametrize("fingerprint", [True, False])
async def test_version_with_different_weight_shapes_is_refused_if_memory_is_insufficient(
    control: Control, fingerprint: bool
) -> None:
    make_version(control.registry, 4, width=8, fingerprint=fingerprint)
    control.park.room = "it needs 2 GiB, 1 GiB is free"
    calls = len(control.double.calls)
    swap = await control.reconciler.swap.run(target(1), target(4), lambda step: None)
    assert (swap.outcome, swap.queued) == (SwapOutcome.REFUSED, None)
    assert swap.reason is not None and "it needs 2 GiB" in swap.reason
    assert not {RELOAD, RESET, PROBE} & set(control.double.calls[calls:])


async def test_swap_to_a_version_without_a_recorded_fingerprint_succeeds(control: Control) -> None:
    make_version(control.registry, 4, fingerprint=False)
    swap = await control.reconciler.swap.run(target(1), target(4), lambda step: None)
    assert swap.outcome is SwapOutcome.SUCCEEDED


async def test_requests_that_name_only_the_model_get_the_new_version_after_a_swap(control: Control) -> None:
    assert (await control.reconciler.swap.run(target(1), target(2), lambda step: None)).outcome is SwapOutcome.SUCCEEDED
    async with control.client() as client:
        answer = await ask(client, stream=True)
    assert (answer.version, answer.words) == (f"{NAME}@2", {"2"})


async def test_swap_to_a_format_that_does_not_exist_is_refused(control: Control) -> None:
    swap = await control.reconciler.swap.run(target(1), target(2, Format.GPTQ), lambda step: None)
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "has no format gptq" in swap.reason


async def test_swap_is_refused_if_a_file_is_unreadable(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr(control.registry, "verify", verify)
    swap = await control.promote(2)
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "Permission denied" in swap.reason


async def test_weights_that_fail_verification_never_serve_a_request(make: Make) -> None:
    control = make()
    make_version(control.registry, 4, probes_of="/elsewhere")
    control.park.prepare = slow
    async with control.run():
        load, outcome, reason = await swap_under_load(control, 4)
        assert control.double.weights.endswith("/1/merged")
        assert control.double.calls.count(RELOAD) == 2
        assert control.double.calls[-1] != RELOAD
        probes = [body for body in control.double.requests if "prompt_logprobs" in body]
        assert len(probes) == 8  # one at the start, six for the bad version, one for the previous one
        assert control.desired().target == target(1)
    load.check()
    assert set(load.versions) == {ONE}
    assert outcome is SwapOutcome.RESTORED
    assert reason is not None and "not the version's weights" in reason
    assert len(control.park.engines) == 1


async def test_nan_logprobs_fail_verification(control: Control) -> None:
    def spoil(path: str) -> None:
        control.double.probe_noise = float("nan") if control.double.weights.endswith("/2/merged") else 0.0

    control.double.on_call = spoil
    swap = await control.promote(2)
    assert swap.outcome is SwapOutcome.RESTORED


async def test_answer_without_logprobs_fails_verification(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    verification = control.double.prompt_logprobs

    def prompt_logprobs(prompt: list[int], model: str) -> list[dict[str, object] | None]:
        return [] if control.double.weights.endswith("/2/merged") else verification(prompt, model)

    monkeypatch.setattr(control.double, "prompt_logprobs", prompt_logprobs)
    swap = await control.promote(2)
    assert swap.outcome is SwapOutcome.FAILED
    assert control.state is EngineState.READY
    assert control.names.served is not None and control.names.served.version == target(1).version


async def test_new_engine_starts_with_the_previous_version_if_a_reload_fails(make: Make) -> None:
    control = make()

    def prepare(double: EngineDouble) -> None:
        slow(double)
        double.loadable = lambda folder: not folder.endswith("/2/merged")

    control.park.prepare = prepare
    async with control.run():
        load, outcome, _ = await swap_under_load(control, 2)
        assert control.state is EngineState.READY
    load.check()
    assert set(load.versions) == {ONE}
    assert outcome is SwapOutcome.FAILED
    assert len(control.park.engines) == 2
    assert control.pool.restarts == 1


@pytest.mark.parametrize(("path", "nth"), [(RESET, 1), (RELOAD, 1), (RESET, 2), (PROBE, 2)])
async def test_no_queued_request_fails_if_the_engine_dies_during_a_swap(make: Make, path: str, nth: int) -> None:
    """The engine dies before, during or after the reload, or in the probes. The first probe is at the start."""
    control = make()
    control.park.prepare = first_only(dies_at(path, nth))
    async with control.run(), control.client() as client:
        wish = control.wish(2)
        await until(lambda: control.admission._closed)
        queued = await asyncio.gather(*(ask(client, stream=stream) for stream in (True, False, True, False)))
        assert (await control.outcome(wish)).outcome is SwapOutcome.FAILED
        await control.serves(target(1))
        assert control.desired().target == target(1)
    assert [(answer.status, answer.error, answer.version) for answer in queued] == [(200, None, ONE)] * 4


async def test_engine_that_dies_while_requests_drain_is_replaced(make: Make) -> None:
    async with make().run() as control, control.client() as client:
        control.double.proceed.clear()
        running = asyncio.create_task(ask(client, stream=True))
        await until(lambda: control.double.running)
        wish = control.wish(2)
        await until(lambda: control.state is EngineState.DRAINING)
        queued = asyncio.create_task(ask(client, stream=False))
        await until(lambda: control.admission.queued)
        control.park.engines[0].kill()
        assert (await running).error == "engine_died"
        assert (await queued).words == {"1"}
        assert (await control.outcome(wish)).outcome is SwapOutcome.FAILED
        await control.serves(target(1))


async def test_engine_that_cannot_be_replaced_is_marked_failed_and_restarted_later(make: Make) -> None:
    control = make()
    async with control.run(), control.client() as client:
        control.double.loadable = lambda folder: False
        control.double.reload_delay_s = 0.05
        control.park.failing_starts = 3
        wish = control.wish(2)
        await until(lambda: control.state is EngineState.SWAPPING)
        queued = await ask(client, stream=False)
        assert (queued.status, queued.error) == (503, "engine_unavailable")
        swap = await control.outcome(wish)
        assert swap.outcome is SwapOutcome.FAILED
        assert any("did not start" in step for step in control.steps)
        await control.serves(target(1))
        assert (await ask(client, stream=False)).words == {"1"}


@asynccontextmanager
async def overrunning(make: Make) -> AsyncIterator[tuple[Control, httpx.AsyncClient, asyncio.Task[Answer]]]:
    """Yield a server with an answer that outlasts a swap's wait, and without memory for a second engine."""
    control = make(drain_timeout_s=0.05)
    control.park.room = "it needs 2 GiB, 1 GiB is free"
    async with control.run(), control.client() as client:
        control.double.token_delay_s = 0.05
        running = asyncio.create_task(ask(client, stream=True))
        await until(lambda: control.double.running)
        yield control, client, running


async def test_swap_is_refused_if_running_requests_exceed_the_drain_timeout(make: Make) -> None:
    async with overrunning(make) as (control, client, running):
        swap = await control.promote(2)
        assert swap.outcome is SwapOutcome.REFUSED
        assert swap.reason is not None
        for part in ("requests were still running", "it needs 2 GiB", "serve.drain_timeout_s"):
            assert part in swap.reason
        assert RELOAD not in control.double.calls
        assert control.state is EngineState.READY
        assert (await running).words == {"1"}
        assert (await ask(client, stream=False)).words == {"1"}


async def test_running_requests_continue_if_engine_health_checks_are_slow(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with overrunning(make) as (control, _, running):

        async def silent() -> Health:
            return Health.BAD

        monkeypatch.setattr(control.replica.client, "health", silent)
        assert (await control.promote(2)).outcome is SwapOutcome.REFUSED
        assert (await running).words == {"1"}
        assert len(control.park.engines) == 1


async def test_swap_fails_if_the_only_engine_dies_while_version_files_are_verified(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only engine dies while the version's files are compared with its manifest."""
    control = make()
    verify = control.registry.verify

    def dies(*version: Any) -> None:
        control.park.engines[0].kill()
        wait_until_failed.wait(5)
        verify(*version)

    wait_until_failed = threading.Event()
    control.reconciler.reviver.backoff_s = (0.5,)
    async with control.run():
        monkeypatch.setattr(control.registry, "verify", dies)
        wish = control.wish(2)
        await until(lambda: control.state is EngineState.FAILED)
        monkeypatch.undo()
        wait_until_failed.set()
        assert (await control.outcome(wish)).outcome is SwapOutcome.FAILED
        assert control.desired().target == target(1)
        await control.serves(target(1))


async def test_engine_is_unchanged_if_the_disk_is_full(control: Control) -> None:
    control.park.disk_full = True
    swap = await control.promote(2)
    control.park.disk_full = False
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "no space left" in swap.reason
    assert RELOAD not in control.double.calls
    assert (control.state, len(control.park.engines)) == (EngineState.READY, 1)


async def test_swap_is_refused_if_version_files_disappear_before_the_engine_starts(control: Control) -> None:
    make_version(control.registry, 4, width=8)

    def gone(more: int) -> str | None:
        raise NotFoundError("it is not there")

    control.park.shortage = gone
    swap = await control.promote(4)
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "is not there" in swap.reason
    assert control.state is EngineState.READY


async def test_swap_waits_for_requests_whose_clients_disconnected(control: Control) -> None:
    control.double.stuck_resets = 2
    swap = await control.promote(2)
    assert swap.outcome is SwapOutcome.SUCCEEDED
    calls = control.double.calls
    assert calls.count(RESET) == 4
    assert calls.index(RELOAD) > calls.index(RESET) + 2


@pytest.fixture
def impatient(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the wait for a prefix cache reset to a tenth of a second."""
    client = control.replica.client
    reset = client.reset_prefix_cache
    monkeypatch.setattr(client, "reset_prefix_cache", lambda: reset(within_s=0.1))


async def test_swap_is_refused_if_the_prefix_cache_cannot_be_reset_before_the_reload(
    control: Control, impatient: None
) -> None:
    control.double.stuck_resets = 1000
    control.park.room = "full"
    swap = await control.promote(2)
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "prefix cache" in swap.reason
    assert RELOAD not in control.double.calls
    assert control.state is EngineState.READY


async def test_swap_fails_if_the_prefix_cache_is_not_reset_after_the_reload(control: Control, impatient: None) -> None:
    first = control.double

    def stick(path: str) -> None:
        first.stuck_resets = 1000 if path == RELOAD else first.stuck_resets

    first.on_call = stick
    swap = await control.promote(2)
    assert swap.outcome is SwapOutcome.FAILED
    assert control.double is not first
    assert control.state is EngineState.READY


async def test_prefix_cache_reset_that_keeps_failing_raises_after_a_timeout(control: Control) -> None:
    control.double.stuck_resets = 1000
    with pytest.raises(EngineError, match=r"within 0\.1 s"):
        await control.replica.client.reset_prefix_cache(within_s=0.1)


async def test_prefix_cache_reset_is_assumed_to_have_succeeded_if_the_engine_returns_no_result(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control.double, "_simple", lambda path: None)
    await control.replica.client.reset_prefix_cache(within_s=0.0)


async def test_engine_gets_no_requests_after_a_swap_is_cancelled_mid_reload(make: Make) -> None:
    control = make()
    async with control.run(), control.client() as client:
        control.double.reload_delay_s = 10
        swapping = asyncio.create_task(control.reconciler.swap.run(target(1), target(2), lambda step: None))
        await until(lambda: control.state is EngineState.SWAPPING)
        queued = asyncio.create_task(ask(client, stream=False))
        await until(lambda: control.admission.queued)
        swapping.cancel()
        answer = await queued
        assert (answer.status, answer.words) == (503, set())
        assert (await ask(client, stream=False)).status == 503


async def test_serving_version_is_unchanged_if_a_swap_is_cancelled_while_requests_drain(make: Make) -> None:
    control = make()
    async with control.run(), control.client() as client:
        control.double.token_delay_s = 0.05
        running = asyncio.create_task(ask(client, stream=True))
        await until(lambda: control.double.running)
        swapping = asyncio.create_task(control.reconciler.swap.run(target(1), target(2), lambda step: None))
        await until(lambda: control.state is EngineState.DRAINING)
        queued = asyncio.create_task(ask(client, stream=False))
        await until(lambda: control.admission.queued)
        swapping.cancel()
        assert [(await task).words for task in (running, queued)] == [{"1"}, {"1"}]
