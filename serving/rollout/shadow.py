"""The shadow step of a rollout: the candidate answers copies of finished production requests.

Copies never delay a client: they are sent after production has answered, a few at a time, and dropped while the server
is busy. Dropped copies are counted, so that a shadow step that compares nothing is visible.

Copies ask for the log-probabilities of the tokens that the candidate samples. Production's answer has them only if the
client asked for them. One copy in `PRODUCTION_INTERVAL` is therefore sent to production, too, to compare both versions.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from serving.admission.admission import Admission
from serving.admission.errors import AdmissionError
from serving.model_names import ModelNotFoundError
from serving.protocols.request import CompletionRequest
from serving.protocols.route import Route
from serving.protocols.sampled_logprobs import mean_logprob, with_logprobs
from serving.protocols.server_sent_events import EventSplitter, is_event
from serving.protocols.wire_formats import Usage, WireFormat, wire_format
from serving.replicas.balancer import Balancer, Lease
from serving.replicas.transport import EngineCall, EngineDiedError, EngineUnreachableError
from serving.telemetry.deployment_metrics import DeploymentMetrics, ShadowOutcome
from svc.dataset.text.thinking import without_thinking
from svc.errors import SvcError
from svc.evaluation.metrics.json_answers import is_json
from svc.store.requests import RequestOutcome, RequestRecord
from svc.store.rollouts import ShadowPair
from svc.version import VersionId

log = logging.getLogger(__name__)

MAX_QUEUED = 16
MAX_QUEUED_BYTES = 32 * 2**20
MAX_ANSWER_BYTES = 16 * 2**20
WORKERS = 2
"""Number of copies that run at the same time."""
PRODUCTION_INTERVAL = 4
"""Number of copies of which one is also sent to production."""


class _Copy(NamedTuple):
    route: Route
    payload: bytes
    answer: list[bytes]
    record: RequestRecord

    @property
    def size(self) -> int:
        return len(self.payload) + sum(map(len, self.answer))


@dataclass(eq=False, kw_only=True)
class Shadow:
    """Sends copies of production requests to a candidate and compares the answers.

    Attributes:
        candidate: the version to compare.
        expects_json: whether answers should be JSON.
        is_shared: whether the candidate is an adapter in the engines of production, whose deaths are not its fault.
        on_pair: called with each compared request, in another thread.
    """

    balancer: Balancer
    admission: Admission
    metrics: DeploymentMetrics
    candidate: VersionId
    expects_json: bool
    is_shared: bool
    on_pair: Callable[[ShadowPair], None]
    _queue: asyncio.Queue[_Copy] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED), init=False)
    _bytes: int = field(default=0, init=False)
    _turns: Iterator[bool] = field(init=False)

    def __post_init__(self) -> None:
        self._turns = itertools.cycle([True] + [False] * (PRODUCTION_INTERVAL - 1))

    def wants(self) -> bool:
        """Return whether the next request may be copied; count it as dropped if server or queue are busy."""
        if self._queue.full() or self.admission.queued:
            self.metrics.shadow_request(ShadowOutcome.DROPPED)
            return False
        return True

    def offer(self, route: Route, payload: bytes, answer: list[bytes], record: RequestRecord) -> None:
        """Queue a copy of a finished request if it was answered or the engine failed; drop it if the queue is full."""
        if record.outcome not in (RequestOutcome.COMPLETE, RequestOutcome.ENGINE_ERROR, RequestOutcome.SERVER_ERROR):
            return
        copy = _Copy(route, payload, list(answer), record)
        if self._queue.full() or self._bytes + copy.size > MAX_QUEUED_BYTES:
            self.metrics.shadow_request(ShadowOutcome.DROPPED)
            return
        self._bytes += copy.size
        self._queue.put_nowait(copy)

    async def run(self) -> None:
        """Send copies until cancelled."""
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
                log.exception("could not compare a request's answers with the candidate's")
                self.metrics.shadow_request(ShadowOutcome.DROPPED)
            else:
                self.metrics.shadow_request(ShadowOutcome.FAILED if pair.candidate_failed else ShadowOutcome.COMPARED)
            finally:
                self._bytes -= copy.size

    async def _compared(self, copy: _Copy) -> ShadowPair | None:
        """Send a copy to the candidate, and return both versions' results.

        Returns:
            None if the copy did not reach the candidate, or if an engine died that it shares with production.
        """
        record = copy.record
        copy = copy._replace(payload=await asyncio.to_thread(with_logprobs, copy.route, copy.payload))
        began = time.monotonic()
        answer = _Answer()
        try:
            async with self.balancer.lease(str(self.candidate)) as engine:
                if engine.served.version != self.candidate:
                    return None
                await answer.read(engine, copy)
        except (AdmissionError, ModelNotFoundError, EngineUnreachableError):
            return None
        except SvcError as error:
            if self.is_shared and isinstance(error, EngineDiedError):
                return None
            log.info("the candidate failed on a copy of a request: %s", error)
        seconds = time.monotonic() - began
        production_failed = record.outcome is not RequestOutcome.COMPLETE
        both = answer.complete and not production_failed
        texts = await asyncio.to_thread(self._read_texts, copy, answer.parts) if both else _Texts()
        candidate_logprob = await asyncio.to_thread(mean_logprob, answer.parts) if both else None
        known = candidate_logprob is not None
        return ShadowPair(
            unit=(record.unit or "").rpartition(":")[2],
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
            production_logprob=await self._production_logprob(copy) if known else None,
            candidate_logprob=candidate_logprob,
        )

    async def _production_logprob(self, copy: _Copy) -> float | None:
        """Return production's mean log-probability for a request, from its answer or from its answer to another copy.

        Returns:
            None if the answer has none and no copy is sent, or if the copy was not answered. This says nothing about
            production's answer to the client.
        """
        known = await asyncio.to_thread(mean_logprob, copy.answer)
        if known is not None or not next(self._turns) or self.admission.queued:
            return known
        answer, version = _Answer(), copy.record.version
        try:
            async with self.balancer.lease(str(version)) as engine:
                if engine.served.version != version:
                    return None
                await answer.read(engine, copy)
        except SvcError as error:
            log.info("production did not answer a copy of a request: %s", error)
            return None
        return await asyncio.to_thread(mean_logprob, answer.parts) if answer.complete else None

    def _read_texts(self, copy: _Copy, parts: list[bytes]) -> "_Texts":
        form = wire_format(copy.route)
        production, candidate = (without_thinking(form.text(each)) for each in (copy.answer, parts))
        if not self.expects_json:
            return _Texts(None, None, production == candidate)
        return _Texts(is_json(production), is_json(candidate), production == candidate)


class _Texts(NamedTuple):
    """What is compared of both versions' texts; None if unknown."""

    production_valid: bool | None = None
    candidate_valid: bool | None = None
    agree: bool | None = None


@dataclass(slots=True)
class _Answer:
    """A version's answer to a copy.

    Attributes:
        parts: the body, or the events of a stream.
        complete: whether the answer arrived in full.
    """

    parts: list[bytes] = field(default_factory=list)
    complete: bool = False
    finish_reason: str | None = None
    usage: Usage | None = None

    async def read(self, engine: Lease, copy: _Copy) -> None:
        """Send the copy, and read the answer.

        Raises:
            EngineError: the version failed.
        """
        request = CompletionRequest("", copy.payload, stream=False, wants_usage=False)
        payload, size, splitter = request.payload(engine.engine_model), 0, EventSplitter()
        async with EngineCall(engine.http, copy.route.value, payload, f"shadow-{copy.record.request_id}") as answer:
            while size <= MAX_ANSWER_BYTES and (part := await answer.read_some()):
                size += len(part)
                self.parts += splitter.feed(part) if answer.is_event_stream else [part]
            if not answer.is_event_stream:
                self.parts, self.complete = [b"".join(self.parts)], size <= MAX_ANSWER_BYTES
        await asyncio.to_thread(self._classify, wire_format(copy.route))

    def _classify(self, form: WireFormat) -> None:
        """Read the end of the answer, its finish reason and its token counts."""
        if not self.parts or not is_event(self.parts[0]):
            body = b"".join(self.parts)
            self.finish_reason, self.usage = form.finish_reason(body), form.usage(body)
            return
        for event in map(form.classify, self.parts):
            self.complete = self.complete or event.end
            self.finish_reason = self.finish_reason or event.finish_reason
            self.usage = event.usage or self.usage
