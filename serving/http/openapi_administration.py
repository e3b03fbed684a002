"""The part of the OpenAPI document that tells of administration: its bodies are described by their own schemas."""

from typing import Any

from pydantic import BaseModel

from serving.http.administration import (
    CreateKeyRequest,
    PromoteRequest,
    RevokeKeyRequest,
    RollbackRequest,
    RotateKeyRequest,
)

Json = dict[str, Any]
_POSTS: dict[str, tuple[str, type[BaseModel]]] = {
    "/svc/promote": ("Wish for a version in production", PromoteRequest),
    "/svc/rollback": ("Wish for the version of before", RollbackRequest),
    "/svc/keys": ("Make a key; its secret is in this answer alone", CreateKeyRequest),
    "/svc/keys/rotate": ("Give a key another secret", RotateKeyRequest),
    "/svc/keys/revoke": ("End a key", RevokeKeyRequest),
}
REFUSED = {
    400: "the body is not what it must be",
    404: "there is no such version, model or key",
    408: "the body did not arrive in time",
    409: "another change came first, or this one is not made",
    413: "the body is too large",
    415: "the content type is not application/json",
    500: "a defect of the gateway",
}
SWAP_PARAMETERS: list[Json] = [
    {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}},
    {"name": "generation", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999}},
]


def posts() -> dict[str, tuple[str, Json, dict[str, Json]]]:
    """By path: what it does, the schema of its body, and the schemas that this one refers to."""
    found = {}
    for path, (summary, kind) in _POSTS.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        found[path] = summary, schema, schema.pop("$defs", {})
    return found
