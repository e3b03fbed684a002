"""Tests that the times between tokens are those of the engine, whatever the client does."""

import asyncio
from pathlib import Path

import pytest

from serving.gateway.delivery import AnswerBuffers
from tests.serving.service import CHAT_PATH, NAME, STREAM, Service

MANY = 6_000
"""Number of tokens; they take more bytes than the buffers between engine and client hold."""


def between_tokens(service: Service, suffix: str, **labels: str) -> float:
    return service.count(f"svc_time_between_tokens_seconds_{suffix}", model=NAME, version="1", **labels)


@pytest.mark.slow
async def test_time_between_tokens_excludes_pauses_caused_by_a_slow_client(
    socket_folder: Path,
) -> None:
    buffers = AnswerBuffers(max_bytes=2**28, max_answer_bytes=64 * 1024)
    async with Service(socket_folder, buffers=buffers).run() as service, service.socket_client() as client:
        service.double.tokens = MANY
        async with client.stream("POST", CHAT_PATH, json=STREAM) as answer:
            await asyncio.sleep(1.5)
            assert service.double.running == 1
            assert (await answer.aread()).endswith(b"data: [DONE]\n\n")
        assert between_tokens(service, "count") == MANY - 1
        assert between_tokens(service, "bucket", le="1.0") == MANY - 1


@pytest.mark.slow
async def test_time_between_tokens_includes_pauses_of_a_slow_engine(socket_folder: Path) -> None:
    async with Service(socket_folder).run() as service, service.socket_client() as client:
        service.double.tokens, service.double.token_delay_s = 4, 0.1
        await client.post(CHAT_PATH, json=STREAM)
        assert between_tokens(service, "count") == 3
        assert between_tokens(service, "bucket", le="0.05") == 0
