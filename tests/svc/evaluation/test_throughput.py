"""Speed is measured under the same conditions each time."""

from svc.evaluation.throughput import STREAMS, TOKENS, tokens_per_second
from tests.serving.engine_double import EngineDouble
from tests.svc.engine.in_process import client_of


async def test_every_stream_generates_its_tokens_from_a_cold_cache() -> None:
    double = EngineDouble(tokens=TOKENS)
    async with client_of(double) as client:
        assert await tokens_per_second(client, [[1, 2], [3, 4], [5, 6]]) > 0
    assert double.calls[0] == "/reset_prefix_cache"
    assert [body["max_tokens"] for body in double.requests] == [TOKENS] * STREAMS
    assert {tuple(body["prompt"]) for body in double.requests} == {(1, 2), (3, 4), (5, 6)}


async def test_a_slower_engine_has_fewer_tokens_a_second() -> None:
    async with client_of(EngineDouble(tokens=TOKENS, token_delay_s=0.004)) as client:
        speed = await tokens_per_second(client, [[1, 2]])
    assert speed <= STREAMS / 0.004
