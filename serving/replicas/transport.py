"""One call to the engine: its failures as typed errors, and its refusals.

Knows vLLM's error texts, so that no other module has to. No text decides whether an engine lives.
"""

import asyncio
import re
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import Any

from serving.admission.errors import ENGINE_RETRY_S, OVERLOADED_RETRY_S
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
"""Refusals of the client's request or for the engine's load; others are between the gateway and the engine."""
_MESSAGE_CHARS = 1000
_TOO_LONG = ("maximum context length", "maximum model length", "cannot be greater than max_model_len")
_GONE = "the engine went away; it is being restarted"
_FIELDS = re.compile(r" \(parameter=([\w.]{1,100})(, value=.*)?\)$", re.DOTALL)
_PATH = re.compile(r"(?<![\w:/.])/(?:[\w.@-]+/)+[\w.@-]*|(?<![\w/])~/[\w./@-]+")
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|File \"[^\"]*\", line \d+")


class EngineDiedError(EngineError):
    """The engine cannot be reached, or went away in the middle of an answer."""

    retry_after_s = ENGINE_RETRY_S


class EngineUnreachableError(EngineDiedError):
    """The engine took no connection: it has seen nothing of the request, and another may answer it."""


class EngineSilentError(EngineError):
    """The engine said nothing for too long."""


class EngineFailedError(EngineError):
    """The engine failed on this request, or refused what the gateway itself is to blame for.

    It is logged, and so quotes nothing of the request.
    """


class EngineBusyError(EngineError):
    """The engine takes no more requests now."""

    retry_after_s = OVERLOADED_RETRY_S


class EngineRefusedError(EngineError):
    """The engine refused the client's request.

    Args:
        status: the engine's HTTP status.
        param: the field at fault, if the engine says it.
    """

    def __init__(self, wrong: str, *, status: int, param: str | None) -> None:
        super().__init__(wrong)
        self.status = status
        self.param = param


class ContextLengthError(EngineRefusedError):
    """More tokens than the model has room for."""


class EngineCall:
    """Sends a request; the body of the `async with` reads the answer, and leaving it early ends the engine's work.

    A class, since a generator costs several times as much in every request.

    Args:
        header_lines: further ones of its head, each with its end.
        show: rewrites the body of an error before it is read; see `Lease`.

    Entering and leaving raises:
        EngineUnreachableError: nothing was sent.
        EngineDiedError, EngineSilentError: also for what happens while the answer is read.
        EngineFailedError: the engine's answer is an error, or breaks off while the engine lives, as vLLM's streamed
            responses do when it fails on them.
        EngineBusyError, EngineRefusedError: the engine's answer is an error.
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
            raise EngineFailedError("the engine broke off its answer") from error
        if isinstance(error, ConnectionFailedError):
            raise _failure(error) from error
        # Whether an engine is dead, its health tells: an error may quote what the client sent.
        if isinstance(error, EngineFailedError) and not await _lives(self._engine):
            raise EngineDiedError(_GONE) from error


def _failure(error: ConnectionFailedError) -> EngineError:
    if isinstance(error, UnreachableError):
        return EngineUnreachableError("the engine takes no connection; it is being restarted")
    if isinstance(error, SilenceError):
        return EngineSilentError("the engine said nothing for too long")
    return EngineDiedError(_GONE)


async def _lives(engine: EngineConnections) -> bool:
    if engine.is_closed:  # the engine was ended, and the request with it
        return False
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S), engine.get("/health") as answer:
            return answer.status == HTTPStatus.OK
    except (ConnectionFailedError, TimeoutError):
        return False


def refusal(status: int, error: Any) -> EngineError:
    """The typed error for what vLLM put under `error`, in an answer or in the middle of a stream.

    Args:
        status: HTTP status; in a stream, the `code` of the error.
        error: `{message, type, param, code}`, or anything else that an engine may say.
    """
    fields = error if isinstance(error, dict) else {}
    message = str(fields.get("message") or "")
    param = fields.get("param")
    if status not in PASSED_STATUSES:
        return EngineFailedError(f"the engine answered {status}: {without_values(message)}")
    if status in (429, 503):
        return EngineBusyError("the engine takes no more requests now")
    text = for_clients(message) or "the engine refused the request"
    kind = ContextLengthError if any(mark in message for mark in _TOO_LONG) else EngineRefusedError
    named = _FIELDS.search(message)  # messages have the field in their text alone
    if not isinstance(param, str):
        param = named[1] if named else None
    return kind(text, status=status, param=param)


def for_clients(message: str) -> str:
    """An engine's message without its paths, its tracebacks and what only its developers need."""
    trace = _TRACEBACK.search(message)
    told = _FIELDS.sub("", message[: trace.start()] if trace else message)
    return _PATH.sub("<path>", told)[:_MESSAGE_CHARS].strip()
