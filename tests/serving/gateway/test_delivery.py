"""Tests that a delivery's data reaches the connection completely and in order, at any client speed."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from serving.admission.errors import OverloadedError
from serving.gateway.delivery import PART_BYTES, AnswerBuffers, ClientSlowError, Delivery

HEADERS = [(b"content-type", b"text/plain")]
HEAD: Message = {"type": "http.response.start", "status": 200, "headers": HEADERS}


class Client:
    """A client's connection that records its messages.

    Args:
        writable: results of successive checks, followed by True forever. While a check returns False, the
            sender waits for one event-loop turn.
    """

    def __init__(self, writable: Iterable[bool] = ()) -> None:
        self._answers = iter(writable)
        self._writable = True
        self.messages: list[Message] = []

    @property
    def is_writable(self) -> bool:
        self._writable = next(self._answers, True)
        return self._writable

    async def send(self, message: Message) -> None:
        if not self._writable:
            await asyncio.sleep(0)
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])


def delivery(client: Any, buffers: AnswerBuffers, caller: str = "one") -> Delivery:
    return Delivery(client.send, buffers, client, caller)


@pytest.fixture
def buffers() -> AnswerBuffers:
    return AnswerBuffers(max_bytes=4 * PART_BYTES, max_answer_bytes=3 * PART_BYTES)


SIZES = st.sampled_from([1, 10, PART_BYTES, PART_BYTES + 1])


@given(st.lists(SIZES, min_size=1, max_size=8), st.lists(st.booleans(), max_size=12))
def test_stream_arrives_completely_and_in_order(sizes: Sequence[int], writable: Sequence[bool]) -> None:
    async def pass_on() -> None:
        connection = Client(writable)
        buffers = AnswerBuffers(max_bytes=4 * PART_BYTES, max_answer_bytes=3 * PART_BYTES)
        events = [bytes([number]) * size for number, size in enumerate(sizes)]
        async with delivery(connection, buffers) as given:
            given.start(HEADERS)
            for event in events:
                await given.put_event(event)
        assert connection.messages[0] == HEAD
        assert connection.body == b"".join(events)
        assert [message["more_body"] for message in connection.messages[1:]] == [True] * (
            len(connection.messages) - 2
        ) + [False]
        assert (buffers.used, given.pending) == (0, False)

    asyncio.run(pass_on())


@pytest.mark.parametrize(("size", "writable"), [(10, True), (PART_BYTES + 1, True), (PART_BYTES + 1, False)])
async def test_non_streamed_answer_arrives_completely(buffers: AnswerBuffers, size: int, writable: bool) -> None:
    connection = Client([writable] * 9)
    async with delivery(connection, buffers) as given:
        given.reserve(size)
        given.start(HEADERS)
        given.put(b"x" * size)
        assert connection.messages == []  # memory that the body still holds is released first
    assert connection.messages[0] == HEAD
    assert connection.body == b"x" * size
    assert connection.messages[-1]["more_body"] is False
    assert (buffers.used, given.pending) == (0, False)


@pytest.mark.parametrize("writable", [True, False])
async def test_all_data_is_sent_if_an_answer_is_shorter_than_its_buffer_reservation(
    buffers: AnswerBuffers, writable: bool
) -> None:
    connection = Client([writable] * 9)
    async with delivery(connection, buffers) as given:
        given.reserve(PART_BYTES + 9)
        given.give_back(4)
        given.start(HEADERS)
        given.put(b"x" * (PART_BYTES + 5))
    assert connection.body == b"x" * (PART_BYTES + 5)
    assert (buffers.used, given.pending) == (0, False)


async def test_data_is_sent_immediately_if_the_connection_is_writable(buffers: AnswerBuffers) -> None:
    connection, tasks = Client(), len(asyncio.all_tasks())
    async with delivery(connection, buffers) as given:
        given.start(HEADERS)
        await given.put_event(b"one")
        assert (connection.body, buffers.used, len(asyncio.all_tasks())) == (b"one", 0, tasks)


async def test_data_is_queued_behind_earlier_unsent_data(buffers: AnswerBuffers) -> None:
    connection = Client([False])
    async with delivery(connection, buffers) as given:
        given.start(HEADERS)
        await given.put_event(b"one")
        await given.put_event(b"two")  # the connection is writable now
        assert connection.messages == []
    assert connection.body == b"onetwo"


async def test_failed_answer_is_not_sent_and_releases_its_buffer_memory(buffers: AnswerBuffers) -> None:
    connection = Client()

    async def break_off() -> None:
        async with delivery(connection, buffers) as given:
            given.start(HEADERS)
            given.reserve(10)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await break_off()
    assert (connection.messages, buffers.used) == ([], 0)


class SlowClient:
    """A connection that accepts no data until it is released."""

    is_writable = False

    def __init__(self) -> None:
        self.may_take = asyncio.Event()
        self.taken = b""

    async def send(self, message: Message) -> None:
        await self.may_take.wait()
        self.taken += message.get("body", b"")


async def test_streams_of_one_caller_pause_once_their_unread_data_fills_half_of_the_buffer_memory() -> None:
    buffers = AnswerBuffers(max_bytes=4 * PART_BYTES, max_answer_bytes=2 * PART_BYTES)
    client, events = SlowClient(), [bytes([number]) * PART_BYTES for number in range(4)]
    read: list[bytes] = []

    async def stream(caller: str) -> None:
        async with delivery(client, buffers, caller) as given:
            given.start(HEADERS)
            for event in events[:1] if caller == "other" else events:
                await given.put_event(event)
                read.append(event)

    async with asyncio.TaskGroup() as group:
        group.create_task(stream("one"))
        group.create_task(stream("one"))
        await asyncio.sleep(0.01)
        assert (len(read), buffers.used) == (2, 2 * PART_BYTES)
        group.create_task(stream("other"))
        await asyncio.sleep(0.01)
        assert (len(read), buffers.used) == (3, 3 * PART_BYTES)
        client.may_take.set()
    assert (len(client.taken), buffers.used) == (9 * PART_BYTES, 0)


async def test_answer_is_rejected_if_its_caller_uses_half_of_the_buffer_memory() -> None:
    buffers = AnswerBuffers(max_bytes=4 * PART_BYTES, max_answer_bytes=PART_BYTES)
    connection = Client()

    def reserve(caller: str) -> Delivery:
        made = delivery(connection, buffers, caller)
        made.reserve(PART_BYTES)
        return made

    reserve("one"), reserve("one")
    with pytest.raises(OverloadedError, match="of them for one"):
        reserve("one")
    assert reserve("other").pending


async def test_largest_allowed_answer_fits_even_if_it_exceeds_half_of_the_buffer_memory(buffers: AnswerBuffers) -> None:
    connection = Client()
    async with delivery(connection, buffers) as given:
        given.reserve(3 * PART_BYTES)
        given.start(HEADERS)
        given.put(bytes(3 * PART_BYTES))
    assert (len(connection.body), buffers.used) == (3 * PART_BYTES, 0)


def test_no_state_is_kept_for_a_caller_after_its_answers_are_delivered(buffers: AnswerBuffers) -> None:
    for number in range(10):
        assert buffers.take(10, 0, str(number))
        buffers.free(10, str(number))
    assert buffers._held == {}


class FillingClient(Client):
    """A connection that accepts a response's headers and nothing afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._full = False

    @property
    def is_writable(self) -> bool:
        return not self._full

    async def send(self, message: Message) -> None:
        if self._full:
            await asyncio.Event().wait()
        self.messages.append(message)
        self._full = True


@pytest.mark.parametrize("streamed", [True, False])
async def test_client_is_disconnected_if_its_connection_accepts_nothing_after_the_headers(streamed: bool) -> None:
    buffers = AnswerBuffers(max_bytes=4 * PART_BYTES, max_answer_bytes=3 * PART_BYTES, client_timeout_s=0.01)

    async def answer() -> None:
        async with asyncio.timeout(2), delivery(FillingClient(), buffers) as given:
            given.start(HEADERS)
            if streamed:
                await given.put_event(b"one")
            else:
                given.reserve(3)
                given.put(b"one")

    with pytest.raises(ClientSlowError):
        await answer()
    assert buffers.used == 0


async def test_buffered_data_is_sent_even_if_the_stream_fails(buffers: AnswerBuffers) -> None:
    class SlowClient(Client):
        async def send(self, message: Message) -> None:
            await asyncio.sleep(0.01)
            self.messages.append(message)

    client = SlowClient([True, *[False] * 7])
    given = delivery(client, buffers)

    async def broken() -> None:
        async with given:
            given.start(HEADERS)
            for number in range(5):
                await given.put_event(b"%d" % number)
                await asyncio.sleep(0)
            raise KeyError

    with pytest.raises(KeyError):
        await broken()
    await given.send_last(b"ERROR")
    assert client.body == b"01234ERROR"
