"""Reads requests from a batch's input file, and writes lines of its result files."""

import asyncio
import codecs
import json
import secrets
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from serving.batches.answer import BatchAnswer

_READ_BYTES = 256 * 1024
_EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}


class RequestLine(msgspec.Struct, frozen=True):
    """A request from a checked input file.

    Attributes:
        body: the JSON of the request, as the client wrote it.
    """

    custom_id: str
    body: msgspec.Raw


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    body: msgspec.Raw


class ResultLine(msgspec.Struct, frozen=True):
    """One line of a result file.

    Attributes:
        response: the response, or None if the request was not answered in time.
    """

    custom_id: str
    response: _Response | None


_REQUESTS = msgspec.json.Decoder(RequestLine)
_RESULTS = msgspec.json.Decoder(ResultLine)


class RequestLines:
    """Distributes the requests of an input file, in order, to several tasks."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._read: deque[bytes] = deque()
        self._turn = asyncio.Lock()

    async def next(self) -> RequestLine | None:
        """Return the next request, or None after the last one."""
        async with self._turn:
            if not self._read:
                # A few together, because a thread costs more than reading one.
                self._read.extend(await asyncio.to_thread(_read_lines, self._file))
            return parse_request_line(self._read.popleft()) if self._read else None

    def close(self) -> None:
        self._file.close()


def _read_lines(file: IO[bytes]) -> list[bytes]:
    """Read some lines, and return those that are not blank. The result is empty only at the end of the file."""
    while lines := file.readlines(_READ_BYTES):
        # The first line may have a byte order mark; the check refuses one in any other line.
        if given := [line for line in lines if line.removeprefix(codecs.BOM_UTF8).strip()]:
            return given
    return []


def read_request_lines(path: Path) -> Iterator[RequestLine]:
    """Yield all requests of an input file."""
    with path.open("rb") as file:
        while lines := _read_lines(file):
            yield from map(parse_request_line, lines)


def parse_request_line(line: bytes) -> RequestLine:
    """Parse a line of a checked input file."""
    try:
        return _REQUESTS.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # only the check's parser accepts it
        given = json.loads(line)
        return RequestLine(given["custom_id"], msgspec.Raw(json.dumps(given["body"]).encode("ascii")))


def result_line(custom_id: str, answer: BatchAnswer) -> bytes:
    """Return the result-file line for an answer."""
    id = secrets.token_hex(12).encode("ascii")
    head = b'{"id":"batch_req_%b","custom_id":%b,"response":{"status_code":%d,"request_id":"%b","body":'
    values = id, json.dumps(custom_id).encode("ascii"), answer.status, answer.request_id.encode("ascii")
    return b"".join((head % values, _one_line(answer.body), b'},"error":null}\n'))


def expired_line(custom_id: str) -> bytes:
    """Return the result-file line for a request that was not answered in time."""
    line = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": None, "error": _EXPIRED}
    return json.dumps(line).encode("ascii") + b"\n"


def parse_result_line(line: bytes) -> ResultLine | None:
    """Parse a line of a result file. Return None if the line is incomplete."""
    try:
        return _RESULTS.decode(line) if line.endswith(b"\n") else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _one_line(body: bytes) -> bytes:
    """Return a body as JSON on one line. A body that is not JSON becomes a JSON string."""
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return json.dumps(body.decode("utf-8", "replace")).encode("ascii")
    return body if b"\n" not in body else json.dumps(json.loads(body)).encode("ascii")
