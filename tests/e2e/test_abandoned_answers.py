"""The tokens charged for an abandoned answer, compared with those that the real engine computed."""

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance

pytestmark = [pytest.mark.slow]

PORT = 8952
CHAT = "/v1/chat/completions"
LEFT = 24
BATCHES_PER_PACE = 3
MOST_TOKENS = 300
SETTLE_S = 1.0
MOST_ERROR = 0.35


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A server of its own: what other tests measure does not change."""
    with closing(Instance(home, tmp_path_factory.mktemp("abandoned") / "home", PORT, PROMPTS)) as instance:
        instance.start("tiny@1")
        yield instance


def counted(instance: Instance) -> tuple[float, float]:
    """Return the tokens out that were charged so far, and those that the engine has generated."""
    page = httpx.get(f"{instance.url}/metrics", timeout=30, trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    charged = [one.value for one in samples if one.name == "svc_key_tokens_total" and one.labels["direction"] == "out"]
    return sum(charged), sum(one.value for one in samples if one.name == "vllm:generation_tokens_total")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed in intervals"])
@pytest.mark.parametrize("together", [1, 8])
def test_the_charge_for_abandoned_answers_is_close_to_the_computed_tokens(
    instance: Instance, report: Report, *, stream: bool, together: int
) -> None:
    chance = random.Random(1)

    async def ask(http: httpx.AsyncClient, *, leave_after_s: float | None) -> None:
        body = {
            "model": "tiny",
            "messages": PROMPTS[chance.randrange(len(PROMPTS))],
            "max_tokens": MOST_TOKENS,
            "ignore_eos": True,
            "stream": stream,
            "stream_interval": 200,
        }
        with suppress(TimeoutError):
            async with asyncio.timeout(leave_after_s):
                (await http.post(CHAT, json=body)).raise_for_status()

    async def run(*leave_after_s: float | None) -> None:
        async with httpx.AsyncClient(base_url=instance.url, timeout=120, trust_env=False) as http:
            await asyncio.gather(*(ask(http, leave_after_s=each) for each in leave_after_s))

    async def timed(together: int) -> float:
        began = time.monotonic()
        await run(*[None] * together)
        return time.monotonic() - began

    longest_s = asyncio.run(timed(together))
    time.sleep(SETTLE_S)
    charged, generated = counted(instance)
    complete = 0
    for batch in range(LEFT // together):
        # The pace of one answer varies by a third on a shared machine: it is measured again and again, as in traffic.
        if batch % BATCHES_PER_PACE == 0:
            longest_s = asyncio.run(timed(together))
            complete += together * MOST_TOKENS
        asyncio.run(run(*(chance.uniform(0.1, 0.9) * longest_s for _ in range(together))))
    time.sleep(SETTLE_S)
    charged_after, generated_after = counted(instance)
    charged_left, computed_left = charged_after - charged - complete, generated_after - generated - complete
    error = charged_left / computed_left - 1
    report(
        f"{LEFT} abandoned answers, {together} at once, {'streamed' if stream else 'whole'}: charged "
        f"{charged_left:.0f} tokens, computed {computed_left:.0f} ({error:+.0%})"
    )
    assert abs(error) < MOST_ERROR
