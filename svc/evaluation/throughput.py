"""Measures an engine's speed under fixed conditions, so that formats can be compared on the same machine."""

import asyncio
import time
from collections.abc import Sequence

from svc.engine.client import EngineClient
from svc.evaluation.intervals import Interval, mean

STREAMS = 8
"""Number of concurrent streams for which a format's speed is reported."""
TOKENS = 16
REPEATS = 3


async def first_token_seconds(client: EngineClient, prompt: Sequence[int]) -> Interval:
    """Return the mean time to first token of an uncached prompt, in seconds, over three measurements on an otherwise
    idle engine.

    Args:
        prompt: token ids of the prompt.
    """
    seconds = []
    for _ in range(REPEATS):
        await client.reset_prefix_cache()
        started = time.monotonic()
        await client.generate(prompt, tokens=1)
        seconds.append(time.monotonic() - started)
    return mean(seconds)


async def decoding_speed(client: EngineClient, prompts: Sequence[Sequence[int]], streams: int) -> Interval:
    """Return the decoding speed in tokens per second, measured three times.

    Prompts are cached, and each stream generates 16 tokens.

    Args:
        prompts: token ids of each prompt; reused in turn if there are fewer prompts than streams.
        streams: number of concurrent requests.
    """
    chosen = [prompts[index % len(prompts)] for index in range(streams)]
    await asyncio.gather(*(client.generate(prompt, tokens=1) for prompt in chosen))
    speeds = []
    for _ in range(REPEATS):
        started = time.monotonic()
        await asyncio.gather(*(client.generate(prompt, tokens=TOKENS) for prompt in chosen))
        speeds.append(streams * TOKENS / (time.monotonic() - started))
    return mean(speeds)
