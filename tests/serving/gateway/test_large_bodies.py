"""Tests that large bodies within the limits block the event loop only briefly until they are sent."""

import json
import time
from collections.abc import Coroutine, Generator
from typing import Any

import pytest
from starlette.types import Receive

from serving.gateway.inference import Exchange
from svc.settings.serve import ServeSettings
from tests.event_loop import max_cpu_s
from tests.serving.service import CHAT_PATH, NAME, Service

MAX_BYTES = ServeSettings().max_body_bytes
USER = {"role": "user", "content": "a"}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (CHAT_PATH, {"messages": [{**USER, "content": "a " * (MAX_BYTES // 2 - 200)}]}),
    "text beyond ASCII": (CHAT_PATH, {"messages": [{**USER, "content": "é" * (MAX_BYTES // 2 - 200)}]}),
    "JSON as text": (CHAT_PATH, {"messages": [{**USER, "content": json.dumps([{"a": 1}] * 50_000)}]}),
    "messages": (CHAT_PATH, {"messages": [USER] * 4096}),
    "parts": (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 8192}]}),
    "token ids": ("/v1/completions", {"prompt": [1] * 130_000}),
    "objects": (CHAT_PATH, {"messages": [USER], "tools": [{"a": [{}] * 15_000}]}),
}


class Steps:
    """Runs a coroutine and measures each of its steps.

    Attributes:
        longest_s: longest CPU time between two waits, in seconds.
    """

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self._work = work
        self.longest_s = 0.0

    def __await__(self) -> Generator[Any, Any, None]:
        sent = None
        while True:
            began = time.thread_time()
            try:
                waited = self._work.send(sent)
            except StopIteration:
                return
            finally:
                self.longest_s = max(self.longest_s, time.thread_time() - began)
            sent = yield waited


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
async def test_no_step_in_handling_a_large_request_blocks_the_event_loop_for_long(
    service: Service, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, fields = BODIES[name]
    body = json.dumps({"model": NAME, "max_tokens": 1, **fields}, ensure_ascii=False, separators=(",", ":")).encode()
    service.double.max_model_len = 10**9
    exchanged, run = list[float](), Exchange.run

    async def timed(exchange: Exchange, receive: Receive) -> None:
        steps = Steps(run(exchange, receive))
        await steps
        exchanged.append(steps.longest_s)

    monkeypatch.setattr(Exchange, "run", timed)
    async with service.socket_client() as client:
        for _ in range(20):  # as in the tests of reading cost
            answer = await client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 200, answer.text
            if exchanged[-1] < (limit_s := max_cpu_s()):
                break
    assert exchanged[-1] < limit_s
