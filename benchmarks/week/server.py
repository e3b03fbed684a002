"""The simulated server: the real instruments, fed with requests and engine changes at simulated times.

As far as its metrics show, it admits requests like the real server. Requests wait for a swap or a waking
engine, and get 503 while the only engine restarts after its death.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from heapq import heappop, heappush
from itertools import count

from prometheus_client import CollectorRegistry, Metric

from benchmarks.week.events import Change, changes
from benchmarks.week.timetable import BACKUP_TIME, DAY_S, HOLDOUT_EVERY_S, MINUTE_S, MODELS, at
from benchmarks.week.traffic import TOKENS, Arrival
from serving.access.authenticator import KeyFault
from serving.protocols.error_code import ErrorCode, outcome_of
from serving.protocols.route import Route
from serving.protocols.wire_formats import Usage
from serving.telemetry.deployment_metrics import DeploymentInstruments, DeploymentMetrics
from serving.telemetry.metrics import CLIENT_GONE_STATUS, UNKNOWN_MODEL, GatewayMetrics
from svc.engine.state import EngineState
from svc.store.requests import RequestRecord
from svc.version import Format, Target, VersionId
from tests.monitoring.drift.traffic import system_prompt

Labels = tuple[tuple[str, str], ...]
Page = dict[tuple[str, Labels], float]
"""Sample values on a metrics page, keyed by name and labels."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""Time at which the week and promtool's tests begin."""
_WAITED_FOR = frozenset({EngineState.IDLE, EngineState.DRAINING, EngineState.SWAPPING})
_ANSWERING = frozenset({EngineState.READY, EngineState.DRAINING, EngineState.SWAPPING})
_STATUS = {
    ErrorCode.ENGINE_ERROR: 502,
    ErrorCode.ENGINE_UNAVAILABLE: 503,
    ErrorCode.RATE_LIMIT_EXCEEDED: 429,
    ErrorCode.CLIENT_GONE: CLIENT_GONE_STATUS,
}
"""HTTP status for each failure. A client that reads too slowly has already received 200."""
_PROMPT_TOKENS, _CACHED_TOKENS = 260, 160
"""Number of tokens in a prompt, and in the shared system prompt that it contains."""
_WAKE_UPS = 60
"""Number of event-loop wake-ups measured per simulated minute. A real server has ten per second, but alerts
read only shares."""
_DISK_BYTES, _FREE_SHARE, _BACKUP_SHARE, _DAILY_SHARE, _BACKUP_S = 2e12, 0.45, 0.02, 0.005, 1_200
_WRONG_KEY_S = 10


class Server:
    """The simulated server.

    Attributes:
        targets: served target of each model.
        holdouts: held-out evaluations that ended since the caller last took them.
        records: request log rows written since the caller last took them.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._registry = CollectorRegistry()
        self._gateway = GatewayMetrics(self._registry, clock=lambda: self._now)
        instruments = DeploymentInstruments(self._registry)
        self._models: dict[str, DeploymentMetrics] = {}
        self._states: dict[str, tuple[EngineState, ...]] = {}
        self._waking = set[str]()
        self._changes = changes()
        self._under_way: list[tuple[float, int, Arrival, float]] = []  # end, order, request, start in the engine
        self._order = count()
        self._generated: defaultdict[str, int] = defaultdict(int)
        self._prompted: defaultdict[str, int] = defaultdict(int)
        self.targets: dict[str, Target] = {}
        self.holdouts: list[Change] = []
        self.records: list[RequestRecord] = []
        for name in MODELS:
            self._gateway.show_errors(None, name)
            self._models[name] = DeploymentMetrics(instruments, name, on_loaded=self._gateway.show_errors)
            self._models[name].unverified(())
            self._models[name].watch_admission(
                lambda name=name: self._count(name, queued=False),  # type: ignore[misc]
                lambda name=name: self._count(name, queued=True),  # type: ignore[misc]
            )
        self._advance(0.0)

    def minute(self, begins: float, arrivals: Sequence[Arrival]) -> Page:
        """Serve the requests of one minute and return the metrics page at its end."""
        for arrival in arrivals:
            self._advance(arrival.at)
            self._admit(arrival)
        self._advance(begins + MINUTE_S)
        for wake_up in range(_WAKE_UPS):
            pause = begins % DAY_S == at(f"1 {BACKUP_TIME}") and wake_up == 0
            self._gateway.loop_lagged(0.4 if pause else 0.0004 * (1 + wake_up % 5))
        for _ in range(MINUTE_S // _WRONG_KEY_S):
            self._gateway.authentication_failed(KeyFault.REVOKED)
        return self.page()

    def page(self) -> Page:
        """Return the samples that a scrape would return now."""
        self._gateway.remove_idle([target.version for target in self.targets.values()])
        page = page_of(self._registry.collect())
        page.update(self._machine())
        for model, states in self._states.items():
            if _ANSWERING & set(states):
                page.update(self._engine(model))
        return page

    def _advance(self, now: float) -> None:
        """Apply all events up to the given time in chronological order."""
        while True:
            change = self._changes[0].at if self._changes else float("inf")
            end = self._under_way[0][0] if self._under_way else float("inf")
            if min(change, end) > now:
                break
            self._now = min(change, end)
            if change <= end:
                self._apply(self._changes.pop(0))
            else:
                _, _, arrival, begins = heappop(self._under_way)
                self._end(arrival, begins)
        self._now = now

    def _apply(self, change: Change) -> None:
        metrics, before = self._models[change.model], self._states.get(change.model)
        if change.version is not None:
            self.targets[change.model] = Target(VersionId(change.model, change.version), Format.GPTQ)
            metrics.version_loaded(self.targets[change.model])
        if change.states is not None:
            self._states[change.model] = change.states
            metrics.engine_states(change.states)
            if before == (EngineState.IDLE,):
                self._waking.add(change.model)
            elif EngineState.READY in change.states:
                self._waking.discard(change.model)
        if change.restarted:
            metrics.engine_restarted()
        if change.swap is not None:
            metrics.swap_ended(change.swap)
        if change.woke_s is not None:
            metrics.woke(change.woke_s)
        if change.holdout is not None:
            metrics.holdout_due(self.targets[change.model], HOLDOUT_EVERY_S)
            self.holdouts.append(change)

    def _admit(self, arrival: Arrival) -> None:
        begins = arrival.at
        states = self._states[arrival.model]
        if arrival.reason is ErrorCode.RATE_LIMIT_EXCEEDED:
            self._gateway.key_refused(arrival.key_id, UNKNOWN_MODEL, "requests_per_minute")
            self._refuse(arrival, arrival.reason, UNKNOWN_MODEL)
            return
        if EngineState.READY not in states:
            if not (_WAITED_FOR & set(states) or arrival.model in self._waking):
                self._refuse(arrival, ErrorCode.ENGINE_UNAVAILABLE, arrival.model)
                return
            begins = next(
                change.at
                for change in self._changes
                if change.model == arrival.model and EngineState.READY in (change.states or ())
            )
        heappush(self._under_way, (begins + arrival.seconds, next(self._order), arrival, begins))

    def _refuse(self, arrival: Arrival, reason: ErrorCode, model: str) -> None:
        self._gateway.request_failed(None, reason, model)
        self._gateway.request_ended(None, Route.CHAT_COMPLETIONS, _STATUS[reason], 0.001, reason=reason, model=model)
        self._record(arrival, reason, None, 0.001)

    def _end(self, arrival: Arrival, begins: float) -> None:
        target, waited, reason = self.targets[arrival.model], begins - arrival.at, arrival.reason
        usage = Usage(_PROMPT_TOKENS, TOKENS)
        if arrival.first_token is not None:
            self._gateway.first_token(target, waited + arrival.first_token)
            observe = self._gateway.between_tokens(target)
            for gap in arrival.gaps:
                observe(gap)
        if reason is None:
            self._gateway.tokens(target, usage)
        else:
            self._gateway.request_failed(target, reason, arrival.model)
        seconds = waited + arrival.seconds
        status = _STATUS.get(reason, 200) if reason else 200
        self._gateway.request_ended(target, Route.CHAT_COMPLETIONS, status, seconds, reason=reason, model=arrival.model)
        self._gateway.key_used(arrival.key_id, arrival.model, usage)
        self._generated[arrival.model] += TOKENS
        self._prompted[arrival.model] += _PROMPT_TOKENS
        self._record(arrival, reason, target, seconds)

    def _record(self, arrival: Arrival, reason: ErrorCode | None, target: Target | None, seconds: float) -> None:
        self._gateway.rows_stored()
        messages = [{"role": "system", "content": system_prompt()}, {"role": "user", "content": arrival.prompt}]
        complete = reason is None
        self.records.append(
            RequestRecord(
                request_id=f"req-{next(self._order)}",
                started_at=datetime.fromtimestamp(arrival.at, UTC),
                model=arrival.model,
                version=target.version if target else None,
                format=target.format if target else None,
                route=Route.CHAT_COMPLETIONS.value,
                status=200 if complete else 500,
                outcome=outcome_of(reason),
                seconds=seconds,
                key_id=arrival.key_id,
                finish_reason="stop" if complete else None,
                tokens_out=TOKENS if complete else None,
                temperature=0.0,
                prompt=json.dumps(messages),
                answer=arrival.answer if complete else None,
            )
        )

    def _count(self, model: str, *, queued: bool) -> int:
        """Return the number of a model's waiting or running requests."""
        mine = [begins for _, _, arrival, begins in self._under_way if arrival.model == model]
        return sum((begins > self._now) is queued for begins in mine)

    def _engine(self, model: str) -> Page:
        """Return the engine metrics of a model, whose requests all go to one replica."""
        version = self.targets[model].version.number
        labels = (("model", model), ("replica", "0"), ("version", str(version)))
        running = self._count(model, queued=False)
        prompted = self._prompted[model]
        values = {
            "vllm:num_requests_running": running,
            "vllm:num_requests_waiting": 0,
            "vllm:kv_cache_usage_perc": 0.01 * running,
            "vllm:generation_tokens_total": self._generated[model],
            "vllm:prefix_cache_queries_total": prompted,
            "vllm:prefix_cache_hits_total": prompted * _CACHED_TOKENS // _PROMPT_TOKENS,
        }
        return {(name, labels): float(value) for name, value in values.items()}

    def _machine(self) -> Page:
        """Return the monitor's machine metrics and Prometheus's own metric for the target."""
        days, backup = divmod(self._now - at(f"1 {BACKUP_TIME}"), DAY_S)
        free = _FREE_SHARE - _DAILY_SHARE * self._now / DAY_S
        if backup < _BACKUP_S:
            free -= _BACKUP_SHARE * backup / _BACKUP_S
        values = {
            "up": 1.0,
            "svc_server_up": 1.0,
            "svc_server_page_readable": 1.0,
            "process_start_time_seconds": -float(DAY_S),
            "svc_home_size_bytes": _DISK_BYTES,
            "svc_home_free_bytes": _DISK_BYTES * free,
            "svc_certificate_expiry_timestamp_seconds": 60.0 * DAY_S,
            "svc_backup_timestamp_seconds": (days - (backup < _BACKUP_S)) * DAY_S + at(f"1 {BACKUP_TIME}"),
        }
        return {(name, ()): value for name, value in values.items()} | {
            ("svc_key_expiry_timestamp_seconds", (("key_id", "portal"),)): 90.0 * DAY_S
        }


def page_of(families: Iterable[Metric]) -> Page:
    """Return the samples of a metrics page, without `_created` samples."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
