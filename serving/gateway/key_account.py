"""Reserves part of each of a key's limits for a request, and records the request's usage when it ends."""

from serving.access.usage_meter import UsageMeter
from serving.admission.errors import RateLimitedError
from serving.admission.party import Party, party_of
from serving.admission.rate_limiter import Demand, Limit, RateLimiter, Reservation, estimated_tokens
from serving.one_shot_event import OneShotEvent
from serving.protocols.error_code import CLIENT_FAULTS, ErrorCode, outcome_of
from serving.protocols.request import CompletionRequest
from serving.protocols.wire_formats import Usage
from serving.telemetry.metrics import UNKNOWN_MODEL, GatewayMetrics
from svc.identity.principal import Principal
from svc.store.requests import RequestOutcome
from svc.version import Target

_BATCH_RETRY_S = 2
_CLIENT_LEFT = (RequestOutcome.CLIENT_GONE, RequestOutcome.CLIENT_SLOW)


class KeyAccount:
    """Counts one request against its key's limits, and records its usage.

    A request without a key has no limits, only usage.

    Args:
        interruption: only for batch requests; see `serving.admission.party.Party`.

    Attributes:
        body_bytes: size of the request's body.
        token_events: number of forwarded events that contain tokens. Used if the engine sends no token counts.
    """

    def __init__(
        self,
        principal: Principal | None,
        limiter: RateLimiter,
        usage: UsageMeter,
        metrics: GatewayMetrics,
        interruption: OneShotEvent | None = None,
    ) -> None:
        self._principal = principal
        self._limiter = limiter
        self._usage = usage
        self._metrics = metrics
        self._interruption = interruption
        self._reservation: Reservation | None = None
        self.body_bytes = self.token_events = 0

    @property
    def key_id(self) -> str | None:
        """Id of the key, or None if the request has no key."""
        return self._principal.key_id if self._principal else None

    @property
    def party(self) -> Party:
        """The tenant that the request belongs to when several tenants share the model."""
        return party_of(self._principal, self._interruption)

    def reserve_request(self) -> None:
        """Count the request against its key's per-minute request limit.

        Raises:
            RateLimitedError: the key has no requests left in this minute.
        """
        if self._principal is None:
            return
        try:
            self._reservation = self._limiter.reserve_request(self._principal)
        except RateLimitedError as error:
            self._metrics.key_refused(self._principal.key_id, UNKNOWN_MODEL, error.limit)
            raise

    def reserve_in_batch(self, request: CompletionRequest, work: int, model: str) -> Reservation | None:
        """Reserve the maximum amount that a batch request may use, provided that half of each limit stays free for the
        key's other requests.

        The daily limit is exempt: batch requests may use all of it.

        Raises:
            RateLimitedError: not enough of a limit is left.
        """
        if self._principal is None:
            return None
        for limit, allowance in self._limiter.allowances(self._principal).items():
            if limit is not Limit.TOKENS_PER_DAY and 2 * allowance.remaining < allowance.limit:
                raise RateLimitedError(
                    f"half of this key's {limit} limit is reserved for requests outside batches",
                    limit=limit.value,
                    retry_after_s=_BATCH_RETRY_S,
                )
        self.reserve_request()
        return self.reserve(request, work, model)

    def reserve(self, request: CompletionRequest, work: int, model: str) -> Reservation | None:
        """For each limit of the request's key except requests per minute, reserve the maximum that the request may use.
        Without a key, do nothing.

        Args:
            work: maximum number of tokens in the request's answers.
            model: the requested model, from a bounded set of names.

        Raises:
            RateLimitedError: not enough of a limit is left.
        """
        if self._principal is None or self._reservation is None:
            return None
        demand = Demand(estimated_tokens(self.body_bytes), work, said=request.max_tokens is not None)
        try:
            self._reservation = self._limiter.reserve(self._principal, demand, self._reservation)
        except RateLimitedError as error:
            self._metrics.key_refused(self._principal.key_id, model, error.limit)
            raise
        return self._reservation

    def settle(
        self, served: Target | None, reason: ErrorCode | None, usage: Usage | None, *, computed: int = 0
    ) -> None:
        """Record the request's usage and replace or release its reservation. Call this once, when the request ends.

        Args:
            served: the version that answered, or None if no version did.
            reason: why the request failed, or None if it succeeded.
            usage: token counts that the engine sent at the end of the answer.
            computed: estimated number of tokens that the engine generated for an answer whose client
                disconnected.
        """
        spent = self._spent(reason, usage, computed) if served else None
        if self._reservation:
            if spent:
                self._reservation.settle(spent.prompt, spent.completion)
            elif reason in CLIENT_FAULTS:
                self._reservation.settle(0, 0)
            else:
                self._reservation.release()
        if spent and served:
            model = served.version.name
            self._metrics.key_used(self.key_id or "", model, spent)
            self._usage.add(self.key_id, model, tokens_in=spent.prompt, tokens_out=spent.completion)

    def _spent(self, reason: ErrorCode | None, usage: Usage | None, computed: int) -> Usage | None:
        """Return the request's usage, or None if it was rejected or failed before its first token.

        If the client disconnected, the tokens of the prompt and the answer are estimated, so that disconnecting
        early saves nothing. An event may contain several tokens, so the number of events is a lower bound.
        """
        client_left = outcome_of(reason) in _CLIENT_LEFT
        if reason and not self.token_events and not client_left:
            return None
        tokens = max(self.token_events, computed) if client_left else self.token_events
        return usage or Usage(estimated_tokens(self.body_bytes), tokens)
