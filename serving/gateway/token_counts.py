"""`POST /v1/messages/count_tokens` and `POST /tokenize`: count a prompt's tokens before it is sent.

An engine counts tokens without running its model. These requests therefore take no slot in admission and are not stored
in the request log. They do not count toward any key limit either, except that a rejected request counts toward the
requests-per-minute limit. They are queued only while no engine accepts requests because an engine is being replaced or
reloaded. Because they use CPU, at most MAX_CONCURRENT of them are answered concurrently, and at most half of that
number for a single caller.
"""

from dataclasses import dataclass
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.admission.rate_limiter import Reservation
from serving.admission.tenant import tenant_of
from serving.engines.transport import EngineCall
from serving.gateway.delivery import ClientSlowError, Delivery
from serving.gateway.inference import Gateway, read_whole
from serving.http.body import ClientGoneError, read_body
from serving.http.body_slots import BodySlots
from serving.http.disconnect import cut_off, while_connected
from serving.http.error_answer import answer_error
from serving.http.errors import api_error
from serving.http.request_state import RequestState, request_state
from serving.models.fine_tuned_models import PREFIXES
from serving.models.routes import require_model
from serving.protocols.error_code import CLIENT_FAULTS
from serving.protocols.request import CompletionRequest, parse_request
from serving.protocols.route import Route, TokenRoute

MAX_CONCURRENT = 16
_CHECKED_AS = {TokenRoute.COUNT_TOKENS: Route.MESSAGES, TokenRoute.TOKENIZE: Route.CHAT_COMPLETIONS}
"""For each token-counting path, the completion route that accepts the same fields. Fields that the route rejects are
rejected here too."""


def token_count_endpoints(gateway: Gateway) -> dict[str, ASGIApp]:
    """Return the ASGI applications that count tokens for a gateway's models, keyed by path."""
    slots = BodySlots(MAX_CONCURRENT, "having their tokens counted")
    return {route.value: _Endpoint(gateway, slots, route) for route in TokenRoute}


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """The ASGI application for one token-counting path.

    It is a class because Starlette would wrap a function in its request machinery.
    """

    gateway: Gateway
    slots: BodySlots
    route: TokenRoute

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, state = self.gateway, request_state(scope)
        max_bytes, slot = gateway.settings.max_body_bytes, partial(gateway.body_slots.reading, state.address)
        principal = state.principal
        reservation: Reservation | None = None
        refused = False
        delivery = Delivery(send, gateway.buffers, state.connection, state.caller)
        try:
            body = await read_body(state.headers, receive, max_bytes=max_bytes, slot=slot)
            if principal is not None:
                reservation = gateway.limiter.reserve_request(principal)
            request = parse_request(body, _CHECKED_AS[self.route], gateway.request_limits)
            del body
            await while_connected(state, self._answer(request, state, delivery))
        except ClientGoneError:
            return
        except ClientSlowError:
            await cut_off(state.connection)
        except Exception as error:
            if delivery.begun:
                raise
            shown = api_error(error)
            refused = shown.code in CLIENT_FAULTS
            await answer_error(shown, scope, receive, send)
        finally:
            if reservation is not None and refused:
                reservation.settle(0, 0)
            elif reservation is not None:
                reservation.release()

    async def _answer(self, request: CompletionRequest, state: RequestState, delivery: Delivery) -> None:
        router = self.gateway.router
        to = None
        if request.model.startswith(PREFIXES):
            to = await self.gateway.fine_tuned.find(request.model, state.principal)
        if to is None:
            require_model(router, state.principal, request.model)
            to = router.find(request.model, request.who)
        await to.backend.check(to.model)
        await to.backend.admission.opened(tenant_of(state.principal))
        async with delivery:  # a client that reads slowly holds no place
            with self.slots.reading(state.caller):
                async with to.backend.lease(to.model, who=request.who) as engine:
                    state.version = engine.served.version
                    payload = request.payload(engine.engine_model)
                    async with EngineCall(
                        engine.http, self.route.value, payload, state.request_id, show=engine.show
                    ) as answer:
                        body = await read_whole(answer, engine, delivery)
                    delivery.start([(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))])
                    delivery.put(body)
