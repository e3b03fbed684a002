"""Prometheus instruments for the served models: their engines, rollouts and queues."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from svc.engine.state import EngineState
from svc.store.rollouts import RolloutOutcome
from svc.store.swaps import SwapOutcome, SwapResult
from svc.version import Target, VersionId

# A swap in place: one to two seconds for the weights, up to the drain timeout for long answers, and an engine start if
# necessary.
_SWAP_BUCKETS_S = (0.5, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600)
# An engine start: 20 s for a small model on a GPU, minutes for a large one.
_WAKE_BUCKETS_S = (1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 300, 600)
_ADAPTER_LOAD_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_QUEUED_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class ShadowOutcome(StrEnum):
    """Outcome of a request in the shadow step of a rollout."""

    COMPARED = "compared"
    FAILED = "failed"
    """The candidate failed to answer the copied request."""
    DROPPED = "dropped"
    """The request was not copied, because the server was busy."""


class DeploymentInstruments:
    """Prometheus instruments that all have a `model` label.

    Args:
        registry: registry for the instruments. Each registry may have only one DeploymentInstruments.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        model, outcome, version = ("model",), ("model", "outcome"), ("model", "version")
        self.running = gauge("svc_requests_running", "Requests currently running in the engines", model)
        self.batched = gauge("svc_batch_requests_running", "Batch requests currently running in the engines", model)
        self.queued = gauge("svc_requests_queued", "Requests currently waiting for a slot or an adapter", model)
        self.engine_state = gauge("svc_engine_state", "Number of engines, by state", ("model", "state"))
        self.replicas_wanted = gauge("svc_replicas_wanted", "Number of engines required for the current load", model)
        self.restarts = counter("svc_engine_restarts_total", "Engine restarts after an engine died", model)
        self.swaps = counter("svc_swaps_total", "Number of swaps, by outcome", outcome)
        self.rollouts = counter("svc_rollouts_total", "Rollouts that have ended, by outcome", outcome)
        self.rollout_share = gauge(
            "svc_rollout_candidate_ratio", "Share of clients that a rollout's candidate serves, 0 to 1", model
        )
        self.shadow_requests = counter(
            "svc_shadow_requests_total",
            "Requests during the shadow step of a rollout, by outcome of the copy",
            outcome,
        )
        self.swap_duration = histogram(
            "svc_swap_duration_seconds",
            "Time in seconds for which a swap queued new requests",
            outcome,
            buckets=_SWAP_BUCKETS_S,
        )
        self.swap_queued = histogram(
            "svc_swap_queued_requests",
            "Maximum number of requests queued at the same time during a swap",
            model,
            buckets=_QUEUED_BUCKETS,
        )
        self.wake_duration = histogram(
            "svc_engine_wake_seconds",
            "Time in seconds from the request that woke an idle engine until the engine was ready",
            model,
            buckets=_WAKE_BUCKETS_S,
        )
        self.version_info = gauge("svc_model_version_info", "1 for the currently loaded version", (*version, "format"))
        self.unverified = gauge(
            "svc_versions_unverified", "Number of served versions that no probe has verified on the engine", model
        )
        self.holdout_interval = gauge(
            "svc_holdout_interval_seconds",
            "Interval in seconds between held-out evaluations, if they are scheduled",
            version,
        )
        self.adapters_loaded = gauge("svc_adapters_loaded", "Number of adapters in the engines' memory", model)
        self.adapter_loads = counter("svc_adapter_loads_total", "Adapters that were loaded and verified", model)
        self.adapter_load = histogram(
            "svc_adapter_load_seconds",
            "Time in seconds from the start of loading an adapter until its probes passed",
            model,
            buckets=_ADAPTER_LOAD_BUCKETS_S,
        )


@dataclass(eq=False)
class DeploymentMetrics:
    """Metrics of one served model.

    Attributes:
        instruments: the instruments, which all models share.
        model: name of the model.
        on_loaded: function called with each version when it is loaded.
    """

    instruments: DeploymentInstruments
    model: str
    on_loaded: Callable[[Target], None] = lambda served: None

    def __post_init__(self) -> None:
        self.instruments.restarts.labels(self.model)
        for outcome in SwapOutcome:  # from the start, so that the first one shows as an increase
            self.instruments.swaps.labels(self.model, outcome.value)
        for ended in RolloutOutcome:
            self.instruments.rollouts.labels(self.model, ended.value)
        for copied in ShadowOutcome:
            self.instruments.shadow_requests.labels(self.model, copied.value)
        self.rollout_share(0.0)

    def watch_admission(
        self, running: Callable[[], int], queued: Callable[[], int], batched: Callable[[], int] = lambda: 0
    ) -> None:
        """Make the gauges report the numbers of running, queued and batch requests on each scrape."""
        self.instruments.running.labels(self.model).set_function(running)
        self.instruments.batched.labels(self.model).set_function(batched)
        self.instruments.queued.labels(self.model).set_function(queued)

    def engine_states(self, states: Sequence[EngineState]) -> None:
        """Set the gauges for the number of engines in each state."""
        for state in EngineState:
            self.instruments.engine_state.labels(self.model, state.value).set(states.count(state))

    def replicas_wanted(self, count: int) -> None:
        """Set the gauge for the number of engines that the load requires, within the configured limits."""
        self.instruments.replicas_wanted.labels(self.model).set(count)

    def engine_restarted(self) -> None:
        self.instruments.restarts.labels(self.model).inc()

    def adapters_loaded(self, count: int) -> None:
        """Set the gauge for the number of adapters that the engines have loaded."""
        self.instruments.adapters_loaded.labels(self.model).set(count)

    def adapter_loaded(self, seconds: float) -> None:
        """Count an adapter load, and record its duration."""
        self.instruments.adapter_loads.labels(self.model).inc()
        self.instruments.adapter_load.labels(self.model).observe(seconds)

    def unverified(self, versions: Collection[VersionId]) -> None:
        """Set the gauge for the number of served versions that are unverified."""
        self.instruments.unverified.labels(self.model).set(len(versions))

    def swap_ended(self, result: SwapResult) -> None:
        """Count a completed swap and, if admission was closed for it, record for how long."""
        self.instruments.swaps.labels(self.model, result.outcome.value).inc()
        if result.queued_s is not None:
            self.instruments.swap_duration.labels(self.model, result.outcome.value).observe(result.queued_s)
        if result.queued is not None:
            self.instruments.swap_queued.labels(self.model).observe(result.queued)

    def rollout_share(self, share: float) -> None:
        """Set the gauge for the share of clients that a rollout's candidate answers."""
        self.instruments.rollout_share.labels(self.model).set(share)

    def rollout_ended(self, outcome: RolloutOutcome) -> None:
        """Count a completed rollout by its outcome."""
        self.instruments.rollouts.labels(self.model, outcome.value).inc()

    def shadow_request(self, outcome: ShadowOutcome) -> None:
        """Add one to the number of requests in shadow steps that had the given outcome."""
        self.instruments.shadow_requests.labels(self.model, outcome.value).inc()

    def woke(self, seconds: float) -> None:
        """Record how long it took to start or wake an idle engine."""
        self.instruments.wake_duration.labels(self.model).observe(seconds)

    def version_loaded(self, served: Target) -> None:
        """Set the info metric to the loaded version, replacing the previous version."""
        self._forget(self.instruments.version_info)
        self.instruments.version_info.labels(self.model, str(served.version.number), served.format.value).set(1)
        self.on_loaded(served)

    def holdout_due(self, served: Target | None, every_s: float) -> None:
        """Set the gauge for the interval between scheduled evaluations of the served version on its held-out set.

        Args:
            served: the served version, or None if there are no such evaluations because the version has no held-out
                set.
        """
        self._forget(self.instruments.holdout_interval)
        if served:
            self.instruments.holdout_interval.labels(self.model, str(served.version.number)).set(every_s)

    def remove(self) -> None:
        """Remove all gauge series of the model. Counters are kept, as Prometheus expects."""
        for instrument in vars(self.instruments).values():
            if isinstance(instrument, Gauge):
                self._forget(instrument)

    def _forget(self, gauge: Gauge) -> None:
        gauge.remove_by_labels({"model": self.model})
