"""Simulates replicas that answer requests with continuous batching, as vLLM does. The simulation uses a simulated
clock and no threads.

Like the gateway, the simulation sends each request to the replica with the fewest requests. Like vLLM, a replica gives
every running answer its next token in each step, and fills the rest of the step with prompt tokens of new requests.
Cached prefixes and preemption are not simulated: a request waits until the KV cache has memory for its whole answer.
"""

import heapq
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, exp, inf, log, sqrt

from serving.sizing.service_times import StepTimes

_WARM_UP = 0.2
"""Share of the simulated requests that only warm up the replicas and are not counted."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that arrive at random times (a Poisson process).

    Attributes:
        rps: requests per second.
        prompt, answer: mean lengths in tokens.
        spread: standard deviation of each length divided by its mean. Lengths have a log-normal distribution.
    """

    rps: float
    prompt: int
    answer: int
    spread: float = 0.0

    def requests(self, count: int, seed: int = 0) -> "list[Request]":
        """Return requests with random arrival times and lengths."""
        rng, now, requests = random.Random(seed), 0.0, list[Request]()  # noqa: S311 - no secret
        for _ in range(count):
            now += rng.expovariate(self.rps)
            requests.append(Request(now, self._length(rng, self.prompt), self._length(rng, self.answer)))
        return requests

    def _length(self, rng: random.Random, mean: int) -> int:
        if not self.spread:
            return mean
        variance = log(1 + self.spread**2)
        return max(1, round(mean * exp(rng.gauss(-variance / 2, sqrt(variance)))))


@dataclass(slots=True, eq=False)
class Request:
    """A simulated request. Times are in seconds; the simulation sets the times of the answer.

    Attributes:
        first, last: times of the first and last token.
        left: number of prompt tokens that have not been computed yet.
    """

    arrived: float
    prompt: int
    answer: int
    first: float = inf
    last: float = inf
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.prompt

    @property
    def context(self) -> int:
        """Mean number of tokens in the KV cache while the answer is generated."""
        return self.prompt + self.answer // 2


@dataclass(frozen=True, slots=True)
class Limits:
    """Capacity of one replica.

    Attributes:
        sequences: maximum number of concurrent requests. Further requests wait.
        cache_tokens: tokens that fit into the KV cache, or None if unknown.
    """

    sequences: int
    cache_tokens: float | None = None


class _Replica:
    def __init__(self, times: StepTimes, limits: Limits) -> None:
        self._times, self._limits = times, limits
        self._now = 0.0
        self._steps = self._context = 0
        self._cached = 0
        self._waiting: deque[Request] = deque()
        self._prompts: deque[Request] = deque()
        self._answers: list[tuple[int, int, Request]] = []  # heap by the number of the step with the last token
        self._added = 0

    @property
    def load(self) -> int:
        return len(self._waiting) + len(self._prompts) + len(self._answers)

    def add(self, request: Request, at: float) -> None:
        if not self.load:
            self._now = max(self._now, at)
        self._waiting.append(request)

    def advance(self, until: float) -> None:
        """Simulate steps until a step ends at or after the given time."""
        while self._now < until and self.load:
            self._admit()
            if self._prompts:
                self._mixed_step()
            else:
                self._decode(until)
            while self._answers and self._answers[0][0] <= self._steps:
                _, _, request = heapq.heappop(self._answers)
                self._finish(request)

    def _admit(self) -> None:
        most = self._limits.cache_tokens
        while self._waiting and len(self._prompts) + len(self._answers) < self._limits.sequences:
            needed = self._waiting[0].prompt + self._waiting[0].answer
            if most is not None and self._cached + needed > most and (self._prompts or self._answers):
                return
            self._cached += needed
            self._prompts.append(self._waiting.popleft())

    def _mixed_step(self) -> None:
        room = max(1, self._times.step_tokens - len(self._answers))
        computed, done = 0, list[Request]()
        while self._prompts and computed < room:
            first = self._prompts[0]
            part = min(first.left, room - computed)
            first.left -= part
            computed += part
            if not first.left:
                done.append(self._prompts.popleft())
        self._now += self._times.step_s(len(self._answers), computed, self._context)
        self._steps += 1
        for request in done:
            request.first = self._now + self._times.overhead_s
            if request.answer == 1:
                self._context += request.context
                self._finish(request)
                continue
            self._context += request.context
            self._added += 1
            heapq.heappush(self._answers, (self._steps + request.answer - 1, self._added, request))

    def _decode(self, until: float) -> None:
        """Simulate all steps until the next answer is finished or the given time is reached. The same requests
        are running in each of these steps.
        """
        step_s = self._times.step_s(len(self._answers), 0, self._context)
        steps = min(self._answers[0][0] - self._steps, ceil((until - self._now) / step_s) if until < inf else inf)
        steps = max(1, int(steps))
        self._now += steps * step_s
        self._steps += steps

    def _finish(self, request: Request) -> None:
        request.last = self._now + self._times.overhead_s
        self._cached -= request.prompt + request.answer
        self._context -= request.context


@dataclass(eq=False)
class _Rollout:
    """A rolling swap. One replica after another stops receiving requests, finishes those it is running, and loads
    the new weights.
    """

    begins: float
    reload_s: float
    index: int = 0
    idle_at: float | None = None
    ends: float = inf

    def away(self, replicas: Sequence[_Replica], now: float) -> int | None:
        """Return the index of the replica that gets no requests at a given time, or None."""
        if now < self.begins or self.index == len(replicas):
            return None
        if self.idle_at is None and not replicas[self.index].load:
            self.idle_at = now
        if self.idle_at is not None and now >= self.idle_at + self.reload_s:
            self.index, self.idle_at = self.index + 1, None
            if self.index == len(replicas):
                self.ends = now
                return None
        return self.index


def simulate(requests: Sequence[Request], replicas: int, times: StepTimes, limits: Limits) -> Sequence[Request]:
    """Simulate answering all requests, and return the requests that arrived after the warm-up."""
    engines = [_Replica(times, limits) for _ in range(replicas)]
    for request in requests:
        for engine in engines:
            engine.advance(request.arrived)
        min(engines, key=lambda engine: engine.load).add(request, request.arrived)
    for engine in engines:
        engine.advance(inf)
    return requests[int(len(requests) * _WARM_UP) :]


def simulate_rollout(
    requests: Sequence[Request], replicas: int, times: StepTimes, limits: Limits, *, reload_s: float
) -> tuple[Sequence[Request], float]:
    """Simulate answering all requests while the replicas load new weights in turn.

    Returns:
        The requests that arrived during the rollout, and its duration in seconds.
    """
    engines = [_Replica(times, limits) for _ in range(replicas)]
    rollout = _Rollout(requests[int(len(requests) * _WARM_UP)].arrived, reload_s)
    held: deque[Request] = deque()
    for now, request in _ticks(requests, reload_s / 20):
        for engine in engines:
            engine.advance(now)
        away = rollout.away(engines, now)
        if request is not None:
            held.append(request)
        open_engines = [engine for index, engine in enumerate(engines) if index != away]
        while held and open_engines:
            min(open_engines, key=lambda engine: engine.load).add(held.popleft(), now)
    for engine in engines:
        engine.advance(inf)
    end = min(rollout.ends, requests[-1].arrived)
    return [each for each in requests if rollout.begins <= each.arrived <= end], end - rollout.begins


def _ticks(requests: Sequence[Request], interval_s: float) -> Iterator[tuple[float, Request | None]]:
    """Yield each request's arrival time, and times in between at which to check whether a replica has become idle."""
    now = requests[0].arrived
    for request in requests:
        while now + interval_s < request.arrived:
            now += interval_s
            yield now, None
        now = request.arrived
        yield now, request
