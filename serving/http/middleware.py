"""The outermost layer: every answer carries its request's id and the version, and no exception gets past it.

Pure ASGI, because the framework's middleware would sit between a stream and its client. Puts `request_id` into the
state of the scope; what answers a completion puts `version` there.
"""

import re
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.errors import api_error
from serving.router import Router

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestMiddleware:
    """Wraps the application.

    Args:
        app: what is wrapped.
        router: tells the version that is loaded, for answers that no version gave.
    """

    def __init__(self, app: ASGIApp, router: Router) -> None:
        self._app = app
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode("ascii"))]
                version = state.get("version") or (self._router.served and self._router.served.version)
                if version:
                    headers.append((b"x-model-version", str(version).encode("ascii")))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if begun:
                raise  # the server in front logs it and cuts the connection: the client sees that it is not complete
            await api_error(error).response()(scope, receive, send_with_headers)


def _request_id(scope: Scope) -> str:
    """The client's own, when it is fit for a log line; else a fresh one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return f"req-{uuid4().hex}"
