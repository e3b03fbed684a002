"""What the check of keys leaves for what stands behind it: a principal in the state of the scope."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.http.caller import PRINCIPAL
from svc.principal import Limits, Principal
from svc.principal import Scope as Permission


class Keyed:
    """An application whose callers are known by the secret that they send.

    Args:
        principals: by secret; who sends none of them has no key.
    """

    def __init__(self, app: ASGIApp, principals: Mapping[str, Principal]) -> None:
        self._app = app
        self._principals = principals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        secret = headers.get(b"authorization", b"").removeprefix(b"Bearer ") or headers.get(b"x-api-key", b"")
        scope.setdefault("state", {})[PRINCIPAL] = self._principals.get(secret.decode())
        await self._app(scope, receive, send)


def principal(key_id: str = "k1", *, weight: int = 1, **limits: int) -> Principal:
    """A key that may ask every model.

    Args:
        limits: fields of `Limits`.
    """
    return Principal(key_id, key_id, frozenset({Permission.INFER}), None, Limits(**limits), weight)
