"""Tests conversations in the terminal."""

import asyncio

import pytest

from serving.server.conversation import Conversation
from svc.errors import EngineError
from svc.remote.server_url import ServerAddress
from tests.serving.engine_double import Fault
from tests.serving.home import Home
from tests.serving.versions import NAME

pytestmark = pytest.mark.slow


async def say(conversation: Conversation, text: str) -> list[str]:
    return await asyncio.to_thread(lambda: list(conversation.ask(text)))


async def test_chat_answer_is_streamed_in_chunks(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        pieces = await say(Conversation(ServerAddress(str(client.base_url)), NAME), "hello")
    assert pieces == ["1.0 ", "1.1 ", "1.2 ", "1.3 "]


async def test_chat_request_includes_previous_turns(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        conversation = Conversation(ServerAddress(str(client.base_url)), NAME, system="be short")
        await say(conversation, "hello")
        await say(conversation, "and then?")
        sent = home.park.double.requests[-1]["messages"]
    assert [turn["role"] for turn in sent] == ["system", "user", "assistant", "user"]
    assert sent[2]["content"] == "1.0 1.1 1.2 1.3 "


async def test_chat_turn_is_removed_if_the_server_rejects_it(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        conversation = Conversation(ServerAddress(str(client.base_url)), NAME)
        home.park.double.max_model_len = 3
        with pytest.raises(EngineError, match="maximum context length"):
            await say(conversation, "one two three four")
        await say(conversation, "one two")
        assert [turn["content"] for turn in home.park.double.requests[-1]["messages"]] == ["one two"]


async def test_chat_raises_if_the_model_is_not_served(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        with pytest.raises(EngineError, match=r"404.*is not served here"):
            await say(Conversation(ServerAddress(str(client.base_url)), "other"), "hello")


async def test_chat_raises_if_the_engine_aborts_an_answer(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        home.park.double.fault = Fault.DIE_IN_STREAM
        with pytest.raises(EngineError, match="aborted the response"):
            await say(Conversation(ServerAddress(str(client.base_url)), NAME), "hello")


async def test_chat_raises_if_no_server_is_running(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        server = ServerAddress(str(client.base_url))
    with pytest.raises(EngineError, match="is not responding"):
        await say(Conversation(server, NAME), "hello")
