"""How fast an engine decodes, under fixed conditions, so that formats can be compared on one machine."""

import asyncio
import time
from collections.abc import Sequence

from svc.engine.vllm.client import EngineClient
from svc.evaluation.metrics import Estimate, mean

STREAMS = 8
TOKENS = 32
_REPEATS = 3
_SPEED_TOKENS = 16


async def tokens_per_second(client: EngineClient, prompts: Sequence[Sequence[int]]) -> float:
    """Generated tokens a second over 8 streams of 32 tokens each, reading the prompts included.

    Args:
        prompts: token ids; used in turn when there are fewer than streams.
    """
    await client.reset_prefix_cache()
    started = time.monotonic()
    streams = (client.generate(prompts[index % len(prompts)], tokens=TOKENS) for index in range(STREAMS))
    await asyncio.gather(*streams)
    return STREAMS * TOKENS / (time.monotonic() - started)


async def first_token_seconds(client: EngineClient, prompt: Sequence[int]) -> Estimate:
    """From a prompt that is in no cache to its first token, three times, alone.

    Args:
        prompt: token ids.
    """
    seconds = []
    for _ in range(_REPEATS):
        await client.reset_prefix_cache()
        started = time.monotonic()
        await client.generate(prompt, tokens=1)
        seconds.append(time.monotonic() - started)
    return mean(seconds)


async def decoding_speed(client: EngineClient, prompts: Sequence[Sequence[int]], streams: int) -> Estimate:
    """Generated tokens a second, three times, of prompts that are in the cache.

    Args:
        prompts: token ids; used in turn when there are fewer than streams.
        streams: at once.
    """
    chosen = [prompts[index % len(prompts)] for index in range(streams)]
    await asyncio.gather(*(client.generate(prompt, tokens=1) for prompt in chosen))
    speeds = []
    for _ in range(_REPEATS):
        started = time.monotonic()
        await asyncio.gather(*(client.generate(prompt, tokens=_SPEED_TOKENS) for prompt in chosen))
        speeds.append(streams * _SPEED_TOKENS / (time.monotonic() - started))
    return mean(speeds)
