"""The shadow step of a rollout: the candidate answers copies of finished production requests.

Copies never delay a client: they are sent after production has answered, a few at a time, and dropped while the server
is busy. Dropped copies are counted, so that a shadow step that compares nothing can be noticed.

Copies request the log-probabilities of the sampled tokens. Production's answer contains them only if the client
requested them. To compare both versions, one copy in `PRODUCTION_INTERVAL` is therefore also sent to production.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from serving.admission.admission import Admission
from serving.admission.errors import AdmissionError
from serving.engines.balancer import Balancer
from serving.engines.model_names import ModelNotFoundError
from serving.engines.transport import EngineCall, EngineDiedError, EngineRefusedError, EngineUnreachableError
from serving.protocols.request import CompletionRequest
from serving.protocols.route import Route
from serving.protocols.sampled_logprobs import mean_logprob, with_logprobs
from serving.protocols.server_sent_events import EventSplitter, is_event
from serving.protocols.wire_formats import Usage, WireFormat, wire_format
from serving.rollout.shadow_pairs import ShadowPair
from serving.telemetry.deployment_metrics import DeploymentMetrics, ShadowOutcome
from svc.dataset.text.thinking import without_thinking
from svc.engine.vllm.connection_pool import EngineConnections
from svc.errors import SvcError
from svc.evaluation.metrics.json_answers import is_json
from svc.store.requests import RequestOutcome, RequestRecord
from svc.version import VersionId

log = logging.getLogger(__name__)

MAX_QUEUED = 16
MAX_QUEUED_BYTES = 32 * 2**20
MAX_ANSWER_BYTES = 16 * 2**20
WORKERS = 2
"""Maximum number of copied requests that are processed concurrently."""
PRODUCTION_INTERVAL = 4
"""One in this many copied requests is also sent to production."""


class Copy(NamedTuple):
    """A copy of a request that production has answered, to be sent to a candidate.

    Attributes:
        payload: JSON for the engine, without `model`.
        answer: body or events of production's answer.
    """

    route: Route
    payload: bytes
    answer: list[bytes]
    record: RequestRecord

    @property
    def size(self) -> int:
        return len(self.payload) + sum(map(len, self.answer))


@dataclass(eq=False, kw_only=True)
class Shadow:
    """Sends copies of production requests to a candidate and compares both versions' answers.

    Attributes:
        candidate: the version to compare with production.
        expects_json: whether answers should be JSON.
        is_shared: whether the candidate is an adapter in production's engines. If so, the candidate is not blamed when
            an engine dies.
        on_pair: function called with each compared request, in another thread.
    """

    balancer: Balancer
    admission: Admission
    metrics: DeploymentMetrics
    candidate: VersionId
    expects_json: bool
    is_shared: bool
    on_pair: Callable[[ShadowPair], None]
    _queue: asyncio.Queue[Copy] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED), init=False)
    _bytes: int = field(default=0, init=False)
    _turns: Iterator[bool] = field(init=False)

    def __post_init__(self) -> None:
        self._turns = itertools.cycle([True] + [False] * (PRODUCTION_INTERVAL - 1))

    def wants(self) -> bool:
        """Return whether to copy the next request. If clients' requests are waiting or the queue of copies is full,
        count the copy as dropped.
        """
        if self._queue.full() or self.admission.queued:
            self.metrics.shadow_request(ShadowOutcome.DROPPED)
            return False
        return True

    def offer(self, route: Route, payload: bytes, answer: list[bytes], record: RequestRecord) -> None:
        """Queue a copy of a finished request, unless it was rejected, or its client disconnected or read too slowly.

        If the queue is full, the copy is dropped.
        """
        if record.outcome not in (RequestOutcome.COMPLETE, RequestOutcome.ENGINE_ERROR, RequestOutcome.SERVER_ERROR):
            return
        copy = Copy(route, payload, list(answer), record)
        if self._queue.full() or self._bytes + copy.size > MAX_QUEUED_BYTES:
            self.metrics.shadow_request(ShadowOutcome.DROPPED)
            return
        self._bytes += copy.size
        self._queue.put_nowait(copy)

    async def run(self) -> None:
        """Process queued copies of requests until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WORKERS):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        while True:
            copy = await self._queue.get()
            try:
                pair = None if self.admission.queued else await self._compared(copy)
                if pair is None:
                    self.metrics.shadow_request(ShadowOutcome.DROPPED)
                    continue
                await asyncio.to_thread(self.on_pair, pair)
            except Exception:  # the boundary of this task: a malformed request must not stop the shadow step
                log.exception("could not compare the production version's and the candidate's answers to a request")
                self.metrics.shadow_request(ShadowOutcome.DROPPED)
            else:
                self.metrics.shadow_request(ShadowOutcome.FAILED if pair.candidate_failed else ShadowOutcome.COMPARED)
            finally:
                self._bytes -= copy.size

    async def _compared(self, copy: Copy) -> ShadowPair | None:
        """Send a copy to the candidate, and return the results of both versions.

        Returns:
            The results, or None if the copy did not reach the candidate or if its answer is too large. Also None if the
            candidate shares an engine with production and this engine died.
        """
        copy = copy._replace(payload=await asyncio.to_thread(with_logprobs, copy.route, copy.payload))
        began, answer = time.monotonic(), CopyAnswer()
        try:
            async with self.balancer.lease(str(self.candidate)) as engine:
                if engine.served.version != self.candidate:
                    return None
                await answer.read(engine.http, engine.engine_model, copy)
        except (AdmissionError, ModelNotFoundError, EngineUnreachableError):
            return None
        except SvcError as error:
            if self.is_shared and isinstance(error, EngineDiedError):
                return None
            log.info("the candidate failed to answer a copy of a client's request: %s", _kind(error))
        if answer.is_too_large:
            return None
        seconds = time.monotonic() - began
        pair = await asyncio.to_thread(compared, copy, answer, seconds, expects_json=self.expects_json)
        if pair.candidate_logprob is None:
            return pair
        return replace(pair, production_logprob=await self._production_logprob(copy))

    async def _production_logprob(self, copy: Copy) -> float | None:
        """Return production's mean log-probability for a request, from its answer to the client or to a copy.

        Returns:
            None if the answer contains no log-probabilities and no copy is sent, or if the copy was not answered.
        """
        known = await asyncio.to_thread(mean_logprob, copy.answer)
        if known is not None or not next(self._turns) or self.admission.queued:
            return known
        answer, version = CopyAnswer(), copy.record.version
        try:
            async with self.balancer.lease(str(version)) as engine:
                if engine.served.version != version:
                    return None
                await answer.read(engine.http, engine.engine_model, copy)
        except SvcError as error:
            log.info("the production version did not answer a copy of a client's request: %s", _kind(error))
            return None
        return await asyncio.to_thread(mean_logprob, answer.parts) if answer.complete else None


def compared(copy: Copy, answer: "CopyAnswer", seconds: float, *, expects_json: bool) -> ShadowPair:
    """Compare both versions' answers to a request, and return the comparison to store.

    Args:
        seconds: time until the candidate's answer was complete.
        expects_json: whether answers should be JSON.
    """
    record = copy.record
    production_failed = record.outcome is not RequestOutcome.COMPLETE
    both = answer.complete and not production_failed
    texts = _read_texts(copy, answer.parts, expects_json) if both else _Texts()
    return ShadowPair(
        unit=unit_of(record),
        production_failed=production_failed,
        candidate_failed=not answer.complete,
        production_valid=texts.production_valid,
        candidate_valid=texts.candidate_valid,
        agrees=texts.agree,
        production_finish=record.finish_reason,
        candidate_finish=answer.finish_reason,
        production_tokens=record.tokens_out,
        candidate_tokens=answer.usage.completion if answer.usage else None,
        production_seconds=record.seconds,
        candidate_seconds=seconds,
        candidate_logprob=mean_logprob(answer.parts) if both else None,
    )


def _kind(error: SvcError) -> str:
    """Return an error's type and HTTP status. The message is omitted, because it may quote a client's request."""
    status = f" (status {error.status})" if isinstance(error, EngineRefusedError) else ""
    return f"{type(error).__name__}{status}"


def unit_of(record: RequestRecord) -> str:
    """Return the hash of a request's user or conversation; empty if the request has neither."""
    return (record.unit or "").rpartition(":")[2]


def _read_texts(copy: Copy, parts: list[bytes], expects_json: bool) -> "_Texts":
    form = wire_format(copy.route)
    production, candidate = (without_thinking(form.text(each)) for each in (copy.answer, parts))
    if not expects_json:
        return _Texts(None, None, production == candidate)
    return _Texts(is_json(production), is_json(candidate), production == candidate)


class _Texts(NamedTuple):
    """Results of checking and comparing both versions' texts. A field is None if unknown."""

    production_valid: bool | None = None
    candidate_valid: bool | None = None
    agree: bool | None = None


@dataclass(slots=True)
class CopyAnswer:
    """A version's answer to a copy of a request.

    Attributes:
        parts: the body, or the events of a stream.
        complete: whether the answer arrived in full.
        is_too_large: whether reading stopped after `MAX_ANSWER_BYTES`. This does not count against the version.
    """

    parts: list[bytes] = field(default_factory=list)
    complete: bool = False
    is_too_large: bool = False
    finish_reason: str | None = None
    usage: Usage | None = None

    async def read(self, http: EngineConnections, engine_model: str, copy: Copy) -> None:
        """Send a copy of a request to an engine, and read the answer.

        Args:
            engine_model: the version's name in the engine.

        Raises:
            EngineError: the version failed.
        """
        request = CompletionRequest("", copy.payload, stream=False, wants_usage=False)
        payload, size, splitter = request.payload(engine_model), 0, EventSplitter()
        async with EngineCall(http, copy.route.value, payload, f"shadow-{copy.record.request_id}") as answer:
            while size <= MAX_ANSWER_BYTES and (part := await answer.read_some()):
                size += len(part)
                self.parts += splitter.feed(part) if answer.is_event_stream else [part]
            self.is_too_large = size > MAX_ANSWER_BYTES
            if not answer.is_event_stream:
                self.parts, self.complete = [b"".join(self.parts)], not self.is_too_large
        await asyncio.to_thread(self._classify, wire_format(copy.route))

    def _classify(self, form: WireFormat) -> None:
        """Set `finish_reason` and `usage` from the answer's parts and, for a stream, also `complete`."""
        if not self.parts or not is_event(self.parts[0]):
            body = b"".join(self.parts)
            self.finish_reason, self.usage = form.finish_reason(body), form.usage(body)
            return
        for event in map(form.classify, self.parts):
            self.complete = self.complete or event.end
            self.finish_reason = self.finish_reason or event.finish_reason
            self.usage = event.usage or self.usage
