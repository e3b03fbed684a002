"""HTTP endpoints for administering the server from other machines.

These endpoints use the same desired state, journal, keys and audit log as `svc`. A request over the network needs a key
with the scope `admin`, and is rejected if no key exists yet (serving.gateway.authentication). The first key is
therefore created on the server's machine.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Engine as Store
from starlette.responses import JSONResponse, Response

from serving.access.keyring import IssuedKey, Keyring, key_row
from serving.http.actor import actor_of
from serving.http.body import ClientGoneError
from serving.http.errors import change_error
from serving.http.json_body import Body, read_json
from serving.rollout.journal import swap_row
from serving.rollout.promotion import PromotionRequest, RolloutOptions, VersionChange
from serving.rollout.version_changes import VersionChanges
from serving.telemetry.metrics import CLIENT_GONE_STATUS
from svc.errors import SettingsError, SvcError
from svc.identity.principal import Limits, Scope
from svc.store.gate_rows import GATE_ROWS
from svc.store.rollouts import RolloutView, read_rollouts
from svc.store.swaps import ServerSwap, SwapRecord, find_swap, server_swaps
from svc.store.unavailable import StoreUnavailableError
from svc.version import Format, Target, VersionId

MAX_BODY_BYTES = 16 * 1024
_MAX_COUNT = 2**31 - 1
_MAX_TOKENS = 2**62
_NEW_SECRET = {"cache-control": "no-store"}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str | None = Field(None, max_length=500)


class PromoteRequest(_Request):
    """Request body for promoting a version to production."""

    version: str = Field(max_length=100)
    format: Format | None = None
    force: bool = False
    shadow: int | None = None
    canary: tuple[float, ...] | None = Field(None, max_length=20)
    direct: bool = False
    dry_run: bool = False


class RollbackRequest(_Request):
    """Request body for rolling a model back to its previous version."""

    model: str = Field(max_length=100)


class KeyLimits(BaseModel):
    """A key's limits in a request body. The fields match those of `svc.identity.principal.Limits`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(None, ge=1, le=_MAX_COUNT)
    tokens_in_per_minute: int | None = Field(None, ge=1, le=_MAX_COUNT)
    tokens_out_per_minute: int | None = Field(None, ge=1, le=_MAX_COUNT)
    concurrent: int | None = Field(None, ge=1, le=_MAX_COUNT)
    tokens_per_day: int | None = Field(None, ge=1, le=_MAX_TOKENS)


class CreateKeyRequest(_Request):
    """Request body for creating an API key."""

    name: str | None = Field(None, max_length=63)
    scopes: frozenset[Scope] = Field(frozenset({Scope.INFER, Scope.FEEDBACK}), min_length=1)
    models: frozenset[str] | None = Field(None, min_length=1, max_length=1000)
    expires_at: datetime | None = None
    limits: KeyLimits = KeyLimits()
    weight: int = Field(1, ge=1, le=1000)


class RotateKeyRequest(_Request):
    """Request body for replacing the secret of an API key."""

    key: str = Field(max_length=63)
    grace_s: float = Field(0.0, ge=0, le=10 * 365 * 86_400, allow_inf_nan=False)


class RevokeKeyRequest(_Request):
    """Request body for revoking an API key."""

    key: str = Field(max_length=63)


class Administration:
    """The HTTP endpoints for administration.

    Args:
        server: id of the server; empty if no other server can use the store.
    """

    def __init__(self, store: Store, changes: VersionChanges, server: str = "") -> None:
        self._store = store
        self._changes = changes
        self._server = server

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/svc/promote", _with_full_errors(self._promote), methods=["POST"])
        app.add_api_route("/svc/rollback", _with_full_errors(self._rollback), methods=["POST"])
        app.add_api_route("/svc/swaps/{name}", _with_full_errors(self._show_swap), methods=["GET"])
        app.add_api_route("/svc/rollouts/{name}", _with_full_errors(self._show_rollouts), methods=["GET"])
        app.add_api_route("/svc/keys", _with_full_errors(self._list_keys), methods=["GET"])
        app.add_api_route("/svc/keys", _with_full_errors(self._create_key), methods=["POST"])
        app.add_api_route("/svc/keys/rotate", _with_full_errors(self._rotate_key), methods=["POST"])
        app.add_api_route("/svc/keys/revoke", _with_full_errors(self._revoke_key), methods=["POST"])

    async def _promote(self, request: Request) -> Response:
        given = await _read(request, PromoteRequest, '{"version": "tickets@2", "reason": "..."}')
        reason = given.reason and given.reason.strip()
        if given.force and not reason:
            raise SettingsError(
                "'force' requires a 'reason'", expected="the reason why a version that failed a gate should be served"
            )
        actor = actor_of(request)
        change = await asyncio.to_thread(
            lambda: self._changes.promote(
                PromotionRequest(
                    VersionId.parse(given.version),
                    given.format,
                    given.force,
                    reason,
                    RolloutOptions(given.shadow, given.canary, given.direct),
                    given.dry_run,
                ),
                actor,
            )
        )
        return JSONResponse(_change_row(change))

    async def _rollback(self, request: Request) -> Response:
        given, actor = await _read(request, RollbackRequest, '{"model": "tickets"}'), actor_of(request)
        change = await asyncio.to_thread(lambda: self._changes.rollback(given.model, reason=given.reason, actor=actor))
        return JSONResponse(_change_row(change))

    async def _show_swap(self, request: Request) -> Response:
        name, generation = request.path_params["name"], request.query_params.get("generation")
        if generation is not None and not (generation.isdecimal() and len(generation) < 10):
            raise SettingsError(
                f"{generation!r} is not a valid value of 'generation'",
                expected="the generation number from the response to the promotion or rollback",
            )
        number = int(generation) if generation else None
        swap = await asyncio.to_thread(find_swap, self._store, name, number, server=self._server)
        servers = [] if number is None else await asyncio.to_thread(server_swaps, self._store, name, number)
        return JSONResponse({"swap": _swap(swap), "servers": [_server_swap(each) for each in servers]})

    async def _show_rollouts(self, request: Request) -> Response:
        records = await asyncio.to_thread(read_rollouts, self._store, request.path_params["name"])
        return JSONResponse({"rollouts": [RolloutView.of(record).model_dump(mode="json") for record in records]})

    async def _list_keys(self, request: Request) -> Response:
        return JSONResponse({"keys": await asyncio.to_thread(self._keyring(request).rows)})

    async def _create_key(self, request: Request) -> Response:
        given = await _read(request, CreateKeyRequest, '{"name": "ci", "scopes": ["infer"]}')
        expires_at = given.expires_at
        if expires_at is not None and expires_at.tzinfo is None:
            expires_at = expires_at.replace(tzinfo=UTC)
        keyring = self._keyring(request)
        issued = await asyncio.to_thread(
            lambda: keyring.create(
                given.scopes,
                name=given.name,
                models=given.models,
                limits=Limits(**given.limits.model_dump()),
                weight=given.weight,
                expires_at=expires_at,
                reason=given.reason,
            )
        )
        return _issued(issued)

    async def _rotate_key(self, request: Request) -> Response:
        given = await _read(request, RotateKeyRequest, '{"key": "ci", "grace_s": 3600}')
        keyring, grace = self._keyring(request), timedelta(seconds=given.grace_s)
        return _issued(await asyncio.to_thread(lambda: keyring.rotate(given.key, grace=grace, reason=given.reason)))

    async def _revoke_key(self, request: Request) -> Response:
        given, keyring = await _read(request, RevokeKeyRequest, '{"key": "ci"}'), self._keyring(request)
        revoked = await asyncio.to_thread(lambda: keyring.revoke(given.key, reason=given.reason))
        return JSONResponse(key_row(revoked))

    def _keyring(self, request: Request) -> Keyring:
        return Keyring(self._store, actor_of(request))


def _with_full_errors(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Wrap an endpoint so that its errors are shown in full, because admins may see the machine's paths and details."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE_STATUS)
        except (SvcError, OSError, StoreUnavailableError) as error:
            return change_error(error).response(request.url.path)

    return answer


async def _read(request: Request, kind: type[Body], expected: str) -> Body:
    return await read_json(request, kind, max_bytes=MAX_BODY_BYTES, expected=expected)


def _change_row(change: VersionChange) -> dict[str, Any]:
    target, before = change.target, change.before
    return {
        **_target(target),
        "before": _target(before),
        "generation": change.generation,
        "undecided": list(change.undecided),
        "rollout": change.rollout,
        "gates": GATE_ROWS.dump_python(change.gates, mode="json"),
        "refused": change.refused,
    }


def _swap(swap: SwapRecord | None) -> dict[str, Any] | None:
    if swap is None:
        return None
    return {"id": swap.id, **_target(swap.target), **swap_row(swap), "steps": list(swap.steps)}


def _server_swap(each: ServerSwap) -> dict[str, Any]:
    return {
        "server": each.server,
        "address": each.address,
        "running": each.running,
        "swap": _swap(each.swap),
        "later": each.later and _target(each.later),
    }


def _target(target: Target) -> dict[str, str]:
    return {"version": str(target.version), "format": target.format.value}


def _issued(issued: IssuedKey) -> Response:
    return JSONResponse(issued.row(), headers=_NEW_SECRET)
