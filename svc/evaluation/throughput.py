"""How fast an engine decodes, under fixed conditions, so that formats can be compared on one machine."""

import asyncio
import time
from collections.abc import Sequence

from svc.engine.vllm.client import EngineClient

STREAMS = 8
TOKENS = 32


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
