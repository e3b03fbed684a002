"""Sends a single request to the engine, and raises a typed error if the engine fails or rejects the request.

This is the only module that relies on vLLM's error messages. An error message never affects whether an engine is
considered alive.
"""

import asyncio
import re
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import Any

from serving.admission.errors import ENGINE_RETRY_S, OVERLOADED_RETRY_S
from serving.protocols.error_code import ErrorCode, answered_with
from svc.engine.error_text import error_of, without_values
from svc.engine.vllm.connection import (
    BrokenConnectionError,
    ConnectionFailedError,
    SilenceError,
    UnreachableError,
)
from svc.engine.vllm.connection_pool import EngineAnswer, EngineConnections
from svc.errors import EngineError

_HEALTH_TIMEOUT_S = 2.0
PASSED_STATUSES = frozenset({400, 413, 422, 429, 503})
"""HTTP statuses with which the engine rejects a request or reports that it is too busy. Any other error status
means that the engine failed."""
_MESSAGE_CHARS = 1000
_TOO_LONG = ("maximum context length", "maximum model length", "cannot be greater than max_model_len")
_GONE = "the engine stopped; it is being restarted"
_FIELDS = re.compile(r" \(parameter=([\w.]{1,100})(, value=.*)?\)$", re.DOTALL)
_PATH = re.compile(r"(?<![\w:/.])/(?:[\w.@-]+/)+[\w.@-]*|(?<![\w/])~/[\w./@-]+")
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|File \"[^\"]*\", line \d+")


@answered_with(503, ErrorCode.ENGINE_DIED)
class EngineDiedError(EngineError):
    """Raised when the engine cannot be reached, or stops while it is sending a response."""

    retry_after_s = ENGINE_RETRY_S


class EngineUnreachableError(EngineDiedError):
    """Raised when the engine refuses the connection, so the request never reached it.

    The request can be sent to another engine.
    """


@answered_with(504, ErrorCode.ENGINE_TIMEOUT)
class EngineSilentError(EngineError):
    """Raised when the engine has not sent any data for too long."""


@answered_with(502, ErrorCode.ENGINE_ERROR)
class EngineFailedError(EngineError):
    """Raised when the engine fails to answer a request, or rejects it because of an error in the gateway.

    The message is logged, so it does not quote the request.
    """


@answered_with(503, ErrorCode.OVERLOADED)
class EngineBusyError(EngineError):
    """Raised when the engine is currently not accepting more requests."""

    retry_after_s = OVERLOADED_RETRY_S


@answered_with(400, ErrorCode.INVALID_REQUEST)
class EngineRefusedError(EngineError):
    """Raised when the engine rejects a client's request.

    Args:
        status: the engine's HTTP status.
        param: name of the invalid field, if the engine reports one.
    """

    def __init__(self, wrong: str, *, status: int, param: str | None) -> None:
        super().__init__(wrong)
        self.status = status
        self.param = param


@answered_with(400, ErrorCode.CONTEXT_LENGTH_EXCEEDED)
class ContextLengthError(EngineRefusedError):
    """Raised when a request has more tokens than the model's context allows."""


class EngineCall:
    """Async context manager that sends a request to the engine and reads the response.

    Leaving the `async with` block before the response ends cancels the engine's work. This is a class because a
    generator would cost several times as much CPU time per request.

    Args:
        header_lines: additional header lines, each including its line end.
        show: function that rewrites the body of an error response before it is parsed; see `Lease`.

    Entering or leaving raises:
        EngineUnreachableError: the connection was refused, and nothing was sent.
        EngineDiedError, EngineSilentError: the engine died or sent nothing for too long, possibly while the
            response was being read.
        EngineFailedError: the engine's response is an error, or breaks off while the engine is alive, as
            vLLM's streamed responses do after an internal error.
        EngineBusyError, EngineRefusedError: the engine's response is an error.
    """

    __slots__ = ("_answer", "_engine", "_show")

    def __init__(
        self,
        engine: EngineConnections,
        path: str,
        payload: bytes,
        request_id: str,
        header_lines: str = "",
        show: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._engine = engine
        self._show = show
        self._answer = engine.post(path, payload, request_id, header_lines)

    async def __aenter__(self) -> EngineAnswer:
        try:
            answer = await self._answer.__aenter__()
        except ConnectionFailedError as error:
            raise _failure(error) from error
        if answer.status < 400:
            return answer
        try:
            body = await answer.read()
            refused = refusal(answer.status, error_of(self._show(body) if self._show else body))
        except ConnectionFailedError as error:
            raise _failure(error) from error
        finally:
            answer.end()
        if isinstance(refused, EngineFailedError) and not await _lives(self._engine):
            raise EngineDiedError(_GONE) from refused
        raise refused

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._answer.end()
        if error is None:
            return
        if isinstance(error, BrokenConnectionError) and await _lives(self._engine):
            raise EngineFailedError("the engine's response ended early") from error
        if isinstance(error, ConnectionFailedError):
            raise _failure(error) from error
        # The health check decides whether an engine is dead, because an error may quote text from the client.
        if isinstance(error, EngineFailedError) and not await _lives(self._engine):
            raise EngineDiedError(_GONE) from error


def _failure(error: ConnectionFailedError) -> EngineError:
    if isinstance(error, UnreachableError):
        return EngineUnreachableError("the engine refused the connection; it is being restarted")
    if isinstance(error, SilenceError):
        return EngineSilentError("the engine sent no data for too long")
    return EngineDiedError(_GONE)


async def _lives(engine: EngineConnections) -> bool:
    if engine.is_closed:  # the engine was stopped, and the request with it
        return False
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S), engine.get("/health") as answer:
            return answer.status == HTTPStatus.OK
    except (ConnectionFailedError, TimeoutError):
        return False


def refusal(status: int, error: Any) -> EngineError:
    """Return the typed error for an `error` value that vLLM sent in a response or a stream.

    Args:
        status: the HTTP status or, in a stream, the error's `code`.
        error: an object `{message, type, param, code}`, or any other value that an engine may send.
    """
    fields = error if isinstance(error, dict) else {}
    message = str(fields.get("message") or "")
    param = fields.get("param")
    if status not in PASSED_STATUSES:
        return EngineFailedError(f"the engine responded with status {status}: {without_values(message)}")
    if status in (429, 503):
        return EngineBusyError("the engine is currently not accepting requests")
    text = for_clients(message) or "the engine rejected the request"
    kind = ContextLengthError if any(mark in message for mark in _TOO_LONG) else EngineRefusedError
    field = _FIELDS.search(message)  # messages name the field only in their text
    if not isinstance(param, str):
        param = field[1] if field else None
    return kind(text, status=status, param=param)


def for_clients(message: str) -> str:
    """Return an engine's error message, stripped of paths, tracebacks and other internals."""
    trace = _TRACEBACK.search(message)
    text = _FIELDS.sub("", message[: trace.start()] if trace else message)
    return _PATH.sub("<path>", text)[:_MESSAGE_CHARS].strip()
