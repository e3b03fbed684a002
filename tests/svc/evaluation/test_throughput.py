"""Tests that speed is measured under the same conditions each time."""

import pytest

from svc.evaluation.throughput import REPEATS, TOKENS, decoding_speed, first_token_seconds
from tests.serving.engine_double import EngineDouble
from tests.svc.engine.in_process import client_of


@pytest.mark.parametrize("streams", [1, 8])
async def test_throughput_is_measured_with_prompts_that_are_already_cached(streams: int) -> None:
    double = EngineDouble(tokens=TOKENS)
    async with client_of(double) as client:
        speed = await decoding_speed(client, [[1, 2], [3, 4], [5, 6]], streams)
    assert 0 < speed.low <= speed.value <= speed.high
    assert [body["max_tokens"] for body in double.requests] == [1] * streams + [TOKENS] * streams * REPEATS
    read = {tuple(body["prompt"]) for body in double.requests[:streams]}
    assert {tuple(body["prompt"]) for body in double.requests[streams:]} == read
    assert "/reset_prefix_cache" not in double.calls


@pytest.mark.slow
async def test_measured_throughput_is_limited_by_the_engine_token_rate() -> None:
    async with client_of(EngineDouble(tokens=TOKENS, token_delay_s=0.004)) as client:
        speed = await decoding_speed(client, [[1, 2]], 8)
    assert speed.high <= 8 / 0.004


async def test_time_to_first_token_is_always_measured_with_a_cold_cache() -> None:
    double = EngineDouble(token_delay_s=0.01)
    async with client_of(double) as client:
        seconds = await first_token_seconds(client, [1, 2])
    assert seconds.low >= 0.01
    assert double.calls == ["/reset_prefix_cache", "/v1/completions"] * REPEATS
