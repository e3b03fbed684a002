"""Calculates how many replicas a load needs, the expected latency and memory use, and the effect of a rollout."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from serving.sizing.model_size import ModelSize
from serving.sizing.service_times import MeasuredTimes, Roofline, StepTimes
from serving.sizing.simulation import Limits, Request, Workload, simulate, simulate_rollout
from svc.engine.gpus import ListedGpu
from svc.engine.vllm.headroom import ENGINE_OVERHEAD
from svc.errors import SettingsError

_GIB = 2**30
_GPU_SHARE = 0.9
"""Share of a GPU's memory that an engine uses by default."""
_MAX_GPUS = 8
_MAX_REPLICAS = 1024
_MIN_REQUESTS, _MAX_REQUESTS = 3000, 20_000
_HORIZON = 20
"""Simulated time as a multiple of the required latency. It is long enough for the wait in a growing queue to
exceed that latency."""
_RELOAD_BYTES_PER_S = 4e9
"""Assumed speed of an in-place reload. On an H200, reloading 16 GB took 3.5 s (vllm#49459)."""
_RELOAD_S = 3.0
"""Assumed duration of an in-place reload if the size of the weights is unknown, in seconds."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles of the requests' latency, in seconds."""

    p50: float
    p95: float
    first_p50: float
    first_p95: float

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Latency":
        whole = sorted(request.last - request.arrived for request in requests)
        first = sorted(request.first - request.arrived for request in requests)
        return cls(_quantile(whole, 0.5), _quantile(whole, 0.95), _quantile(first, 0.5), _quantile(first, 0.95))


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one replica, in bytes, summed over its GPUs.

    Attributes:
        cache_tokens: tokens that fit into the KV cache.
        second_engine: whether a second engine with a KV cache for one request also fits on the same GPUs.
    """

    total: float
    weights: float
    cache: float
    cache_tokens: float
    second_engine: bool


@dataclass(frozen=True, slots=True)
class RolloutEffect:
    """Latency of the requests that arrive while the replicas load new weights one after another.

    Attributes:
        reload_s: assumed duration of a reload, in seconds.
        seconds: duration of the rollout.
        longest_wait_s: longest time to first token.
    """

    reload_s: float
    seconds: float
    latency: Latency
    longest_wait_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The smallest number of replicas that meets the required latency, and the performance to expect from it.

    Attributes:
        gpus: GPUs per replica.
        idle_s: duration of an answer of mean length on an idle replica, in seconds.
        memory: memory per replica, or None if the model or the GPU is unknown.
    """

    replicas: int
    gpus: int
    idle_s: float
    latency: Latency
    rollout: RolloutEffect
    memory: Memory | None


def choose_gpus(size: ModelSize, gpu: ListedGpu, tokens: int) -> tuple[int, Memory]:
    """Return the smallest number of GPUs per replica with enough memory for the model and one request, and how the
    memory is used.

    Args:
        tokens: combined length of the prompt and answer of one request, in tokens.

    Raises:
        SettingsError: not even eight GPUs have enough memory.
    """
    needed = size.weight_bytes + ENGINE_OVERHEAD + tokens * size.token_bytes
    for gpus in (1, 2, 4, _MAX_GPUS):
        total = gpus * gpu.memory_gib * _GIB * _GPU_SHARE
        if needed <= total and size.heads % gpus == 0 and (size.kv_heads % gpus == 0 or gpus % size.kv_heads == 0):
            cache = total - size.weight_bytes - ENGINE_OVERHEAD
            return gpus, Memory(total, size.weight_bytes, cache, cache / size.token_bytes, 2 * needed <= total)
    raise SettingsError(
        f"{size.label} needs {needed / _GIB:.0f} GiB: {_MAX_GPUS} x {gpu.label} have too little memory, "
        "or the attention heads cannot be split evenly over them",
        todo="choose a larger GPU, or --bits 4",
    )


def make_plan(
    workload: Workload, p95_s: float, times: StepTimes, sequences: int, memory: Memory | None, reload_s: float | None
) -> Plan:
    """Return a plan with the smallest number of replicas that completes 95% of the answers in time.

    Args:
        p95_s: the required 95th percentile of the latency, in seconds.
        sequences: maximum number of concurrent requests per replica.
        reload_s: duration of a reload, in seconds. If None, a typical duration is assumed.

    Raises:
        SettingsError: no number of replicas meets the requirement.
    """
    limits = Limits(sequences, memory.cache_tokens if memory else None)
    idle = [_alone(replace(workload, spread=0.0), times, limits, 1), _alone(workload, times, limits, 200)]
    if p95_s < idle[1].p95:
        spread = f" (95% of them within {idle[1].p95:.2f} s)" if workload.spread else ""
        raise SettingsError(
            f"--p95 is {p95_s:g} s, but an answer takes {idle[0].p50:.2f} s on an idle replica{spread}",
            expected="a higher value for --p95; more replicas do not make a single answer faster",
            todo="ask for shorter answers, or choose a faster GPU or a smaller model",
        )
    count = min(_MAX_REQUESTS, max(_MIN_REQUESTS, int(workload.rps * p95_s * _HORIZON)))

    def latency(replicas: int) -> Latency:
        return Latency.of(simulate(workload.requests(count), replicas, times, limits))

    replicas = _smallest(lambda number: latency(number).p95 <= p95_s)
    weights = memory.weights if memory else None
    reload_s = reload_s or (max(1.0, weights / _RELOAD_BYTES_PER_S) if weights else _RELOAD_S)
    during, seconds = simulate_rollout(workload.requests(count), replicas, times, limits, reload_s=reload_s)
    effect = RolloutEffect(
        reload_s, seconds, Latency.of(during), max(request.first - request.arrived for request in during)
    )
    gpus = times.gpus if isinstance(times, Roofline) else 1
    return Plan(replicas, gpus, idle[0].p50, latency(replicas), effect, memory)


def predict(workload: Workload, replicas: int, times: StepTimes, sequences: int, count: int = _MIN_REQUESTS) -> Latency:
    """Return the predicted latency of the load's requests with the given number of replicas."""
    return Latency.of(simulate(workload.requests(count), replicas, times, Limits(sequences)))


def differs_from_measurement(workload: Workload, times: StepTimes) -> bool:
    """Return whether the load's requests are less than half or more than twice as long as the measured requests."""
    if not isinstance(times, MeasuredTimes):
        return False
    pairs = ((workload.prompt, times.prompt), (workload.answer, times.answer))
    return any(not 0.5 <= wanted / measured <= 2 for wanted, measured in pairs)


def _alone(workload: Workload, times: StepTimes, limits: Limits, count: int) -> Latency:
    """Return the latency of requests that each run alone on an idle replica."""
    requests = workload.requests(count)
    for request in requests:
        simulate([request], 1, times, limits)
    return Latency.of(requests)


def _smallest(enough: Callable[[int], bool]) -> int:
    """Return the smallest sufficient number of replicas, assuming that adding replicas never increases the latency."""
    high = 1
    while not enough(high):
        high *= 2
        if high > _MAX_REPLICAS:
            raise SettingsError(
                f"{_MAX_REPLICAS} replicas are not enough for this load",
                expected=f"a load that at most {_MAX_REPLICAS} replicas can serve within --p95",
                todo="set a longer --p95",
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _quantile(values: Sequence[float], share: float) -> float:
    return (
        statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]
        if len(values) > 1
        else values[0]
    )
