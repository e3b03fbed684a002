"""Tests engines that cannot be probed, such as output-layer adapters on a CPU: they serve as unverified."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from svc.store.swaps import SwapKind, SwapOutcome
from svc.version import Format
from tests.serving.control import Control, Load, Make, until
from tests.serving.home import Home
from tests.serving.versions import NAME, target

WHY = "log-probabilities of a prompt end it"
RELOAD = "/collective_rpc"
FULL = "it needs 2 GiB, 1 GiB is free"


def unprobed(control: Control) -> Control:
    """Return a server whose engines would crash if they were asked for the log-probabilities of a prompt."""
    control.park.unprobed = WHY
    return control


def probed(control: Control) -> list[object]:
    """Return the requests that asked engines for log-probabilities of prompts."""
    return [body for engine in control.park.engines for body in engine.double.requests if "prompt_logprobs" in body]


@pytest.fixture
async def serving(make: Make) -> AsyncIterator[Control]:
    async with unprobed(make()).run() as control:
        yield control


@pytest.mark.slow
async def test_unverified_engine_serves_requests_and_is_never_probed(serving: Control) -> None:
    async with serving.client() as client, Load(client).run() as load:
        await asyncio.sleep(0.05)
    load.check()
    checked = serving.replica.checked
    assert checked and (checked.verified, checked.found) == (False, f"not verified: {WHY}")
    assert probed(serving) == []


async def test_unverified_version_appears_in_the_metrics(serving: Control) -> None:
    assert serving.sample("svc_versions_unverified", model=NAME) == 1


async def test_number_of_unverified_versions_is_zero_if_engines_are_verified(control: Control) -> None:
    assert probed(control)
    assert control.collector.get_sample_value("svc_versions_unverified", {"model": NAME}) == 0


async def test_stopped_engine_does_not_count_as_unverified(serving: Control) -> None:
    await serving.pool.stop()
    assert serving.sample("svc_versions_unverified", model=NAME) == 0


async def test_unverified_engine_restarts_for_each_promotion_and_the_journal_shows_why(serving: Control) -> None:
    result = await serving.promote(2)
    assert (result.outcome, result.kind) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN)
    steps = "\n".join(serving.steps)
    assert f"the engine's weights could not be verified after a reload: {WHY}" in steps
    assert f"not verified: {WHY}" in steps
    assert [engine.double.calls.count(RELOAD) for engine in serving.park.engines] == [0, 0]


@pytest.mark.slow
async def test_single_engine_restarts_if_memory_is_insufficient_for_a_second_engine(serving: Control) -> None:
    serving.park.room = FULL
    result = await serving.promote(2)
    assert (result.outcome, result.kind) == (SwapOutcome.SUCCEEDED, SwapKind.INPLACE)
    assert [engine.double.calls.count(RELOAD) for engine in serving.park.engines] == [0, 0]


@pytest.mark.slow
async def test_all_engines_restart_if_memory_is_insufficient_for_an_additional_engine(make: Make) -> None:
    async with unprobed(make(replicas=2)).run() as control:
        await until(lambda: len(control.pool.ready) == 2)
        control.park.room = FULL
        result = await control.promote(2)
        assert (result.outcome, result.kind) == (SwapOutcome.SUCCEEDED, SwapKind.ROLLING)
        assert {member.target for member in control.pool.members} == {target(2)}


@pytest.mark.slow
async def test_unverified_engine_left_by_an_earlier_server_is_replaced(make: Make) -> None:
    """Only the engine's record would tell which version it holds."""
    control = unprobed(make())
    control.leaves = True
    async with control.run():
        pass
    control.leaves = False
    control.assemble()
    async with control.run():
        assert [engine.alive for engine in control.park.engines] == [False, False, True]
        assert control.replica.target == target(1)


async def test_unverified_engine_does_not_serve_damaged_files(serving: Control) -> None:
    file = serving.registry.folder(target(2).version) / "merged" / "tokenizer.json"
    file.write_text('{"a": 1}')
    assert (await serving.promote(2)).outcome is SwapOutcome.REFUSED


@pytest.mark.slow
async def test_adapters_are_loaded_without_verification(make: Make) -> None:
    async with unprobed(make(format=Format.ADAPTER)).run() as control:
        result = await control.promote(2)
        assert (result.outcome, result.kind) == (SwapOutcome.SUCCEEDED, SwapKind.ADAPTER)
        assert control.steps[-1] == f"adapter loaded: not verified: {WHY}"
        assert control.sample("svc_versions_unverified", model=NAME) == 2
        assert probed(control) == []


@pytest.mark.slow
async def test_server_shows_that_a_version_is_unverified(home: Home) -> None:
    home.park.unprobed = WHY
    async with home.serving(NAME) as client:
        (status,) = (await client.get("/svc/status")).json()["models"]
        page = (await client.get("/metrics")).text
    (engine,) = status["engines"]
    assert (engine["verified"], engine["verification"]) == (False, f"not verified: {WHY}")
    assert (status["holdout"]["state"], status["holdout"]["reason"]) == ("off", WHY)
    assert 'svc_versions_unverified{model="tuned"} 1.0' in page
