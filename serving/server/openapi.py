"""The HTTP API as a hand-written OpenAPI document.

It is written by hand because completion endpoints are ASGI applications, so the framework cannot derive schemas for
their bodies, and because the gateway checks only a few fields of a completion. The document describes what the
gateway itself guarantees: the fields that it checks, and the response format of each status. The
engine's bodies appear as plain objects; see vLLM's documentation for their fields.
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel

from serving.batches.request import BatchRequest
from serving.batches.routes import MAX_PAGE as MAX_BATCHES
from serving.feedback.routes import FeedbackRequest
from serving.files.routes import MAX_PAGE as MAX_FILES
from serving.files.rows import UPLOAD_PURPOSES
from serving.files.upload_routes import CompleteUploadRequest, CreateUploadRequest
from serving.fine_tuning.request import JobRequest
from serving.fine_tuning.routes import MAX_PAGE
from serving.http.errors import ANTHROPIC_TYPES
from serving.protocols.error_code import ErrorCode
from serving.protocols.route import ANTHROPIC_PATHS, Route, TokenRoute
from serving.protocols.unsupported_fields import MAX_ANSWERS
from serving.server.administration import (
    CreateKeyRequest,
    PromoteRequest,
    RevokeKeyRequest,
    RollbackRequest,
    RotateKeyRequest,
)

JSON = "application/json"
_SCHEMAS = "#/components/schemas/"
Json = dict[str, Any]

_OBJECT: Json = {"type": "object", "additionalProperties": True}
_COUNT: Json = {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31 - 1}
_TURNS: Json = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "object", "required": ["role"], "properties": {"role": {"type": "string"}}},
}
_ITEMS: Json = {"type": "array", "minItems": 1, "items": _OBJECT}
_NEVER: Json = {"type": "null", "description": "not supported; must be null or omitted"}
_ONLY_FALSE: Json = {"enum": [False, None], "description": "only false and null are supported"}
_COMMON: Json = {
    "model": {
        "type": "string",
        "description": "NAME or NAME@production for the production version, or NAME@N for a loaded version",
    },
    "stream": {"type": ["boolean", "null"]},
    "prompt_logprobs": _NEVER,
    "kv_transfer_params": _NEVER,
    "ec_transfer_params": _NEVER,
    "vllm_xargs": {
        "type": ["object", "null"],
        "not": {"anyOf": [{"required": ["kv_transfer_params"]}, {"required": ["ec_transfer_params"]}]},
    },
}
_STREAM_OPTIONS: Json = {
    "type": ["object", "null"],
    "properties": {"include_usage": {"type": ["boolean", "null"]}},
    "additionalProperties": True,
}
_ANSWERS: Json = {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_ANSWERS}
_PROMPT: Json = {"anyOf": [{"type": "string"}, {"type": "array"}]}
_REQUESTS: Mapping[Route | TokenRoute, tuple[str, list[str], Json]] = {
    Route.CHAT_COMPLETIONS: (
        "Create a chat completion",
        ["model", "messages"],
        {
            "messages": _TURNS,
            "stream_options": _STREAM_OPTIONS,
            "n": _ANSWERS,
            "echo": _ONLY_FALSE,
            "max_tokens": _COUNT,
            "max_completion_tokens": _COUNT,
        },
    ),
    Route.COMPLETIONS: (
        "Create a plain completion",
        ["model", "prompt"],
        {"prompt": _PROMPT, "stream_options": _STREAM_OPTIONS, "n": _ANSWERS, "max_tokens": _COUNT},
    ),
    Route.RESPONSES: (
        "Create a response",
        ["model", "input"],
        {
            "input": {"anyOf": [{"type": "string"}, _ITEMS]},
            "max_output_tokens": _COUNT,
            "background": _ONLY_FALSE,
            "store": _ONLY_FALSE,
            "previous_response_id": _NEVER,
            "conversation": _NEVER,
        },
    ),
    Route.MESSAGES: (
        "Create a message in the format of Anthropic's API",
        ["model", "messages", "max_tokens"],
        {"messages": _TURNS, "max_tokens": {**_COUNT, "type": "integer"}},
    ),
    TokenRoute.COUNT_TOKENS: (
        "Count the tokens of a message's prompt, in the format of Anthropic's API",
        ["model", "messages"],
        {"messages": _TURNS},
    ),
    TokenRoute.TOKENIZE: (
        "Return the token ids of `prompt` or of a chat's `messages`",
        ["model"],
        {"prompt": {"type": "string"}, "messages": _TURNS},
    ),
}
_BAD_BODY = {
    400: "the body is not a JSON object, a field is not supported, or the engine rejected the request",
    408: "the request body did not arrive in time",
    413: "the request body is too large",
    415: "the content type is not application/json",
}
_ENGINE = {
    404: "no loaded version has this name",
    422: "the engine rejected the request",
    429: "too many requests are running, or the key has reached one of its limits; see retry-after",
    502: "the engine failed to answer this request",
    503: "no engine is available, or the queue is full; see retry-after",
    504: "the engine did not answer in time",
}
_KEYS = {
    401: "the API key is missing or invalid",
    403: "the key lacks the required scope",
    429: "too many invalid API keys came from this address; see retry-after",
    503: "API keys cannot currently be checked",
}
_DEFECT = {500: "an internal error in the gateway"}
_OTHER_HOST = {421: "the Host header contains a name that this server does not accept"}
_KEY_HEADERS: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_MODEL_NAME: Json = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_ID: Json = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_UPLOAD_REFUSED = {
    400: "the form is malformed, a field is invalid, or the key's files exceed a limit",
    403: "the key lacks the required scope, or a web page from another site sent the form",
    408: "the request body arrived too slowly",
    413: "the file or the form is too large",
    415: "the content type is not multipart/form-data",
    429: "too many uploads are running; see retry-after",
    507: "the server's file storage is full",
}
_RANGES = {400: "the Range header is invalid", 416: "the range is outside the file"}
_NO_MODEL = {404: "no loaded version has this name", 503: "no version is loaded yet", **_DEFECT}

_CHANGES: dict[str, tuple[str, type[BaseModel]]] = {
    "/svc/promote": ("Promote a version to production", PromoteRequest),
    "/svc/rollback": ("Return to the previous version", RollbackRequest),
    "/svc/keys": ("Create a key; its secret is only in this response", CreateKeyRequest),
    "/svc/keys/rotate": ("Replace a key's secret", RotateKeyRequest),
    "/svc/keys/revoke": ("Revoke a key", RevokeKeyRequest),
}
_CHANGE_REFUSED = {
    **_BAD_BODY,
    400: "the body is invalid",
    404: "the version, model or key does not exist",
    409: "another change was made first, or this change was refused",
    **_DEFECT,
}


@cache
def openapi_document() -> Json:
    """Return the OpenAPI document as JSON values. It is built only once, so callers must not modify it."""
    schemas = {"Error": _ERROR, "MessagesError": _MESSAGES_ERROR, "Model": _MODEL}
    schemas["FeedbackRequest"] = _schema(FeedbackRequest, schemas)
    requests = {route.value: _engine_request(route) for route in _REQUESTS}
    return {
        "openapi": "3.1.0",
        "info": {"title": "tuneserve", "version": version("tuneserve")},
        "paths": {
            **requests,
            **_small_paths(),
            **_fine_tuning(schemas),
            **_batches(schemas),
            **_files(),
            **_uploads(schemas),
            **_administration(schemas),
        },
        "components": {"schemas": schemas, "securitySchemes": _KEY_HEADERS},
        "security": [{}, *({name: []} for name in _KEY_HEADERS)],  # none while no key exists
    }


def _schema(kind: type[BaseModel], schemas: Json) -> Json:
    """Return the JSON schema of a request body. Any schemas that it refers to are added to `schemas`."""
    schema = kind.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
    schemas |= schema.pop("$defs", {})
    return schema


def _engine_request(route: Route | TokenRoute) -> Json:
    summary, required, properties = _REQUESTS[route]
    if isinstance(route, Route):
        summary = f"{summary}; with `stream`, the response is sent as server-sent events"
        properties, answers = {**_COMMON, **properties}, {**_json(_OBJECT), "text/event-stream": {}}
    else:
        properties, answers = {"model": _COMMON["model"], **properties}, _json(_OBJECT)
    body = {**_OBJECT, "required": required, "properties": properties}
    operation = {
        "operationId": route.name.lower(),
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": _answer("the engine's answer", answers),
            **_errors({**_BAD_BODY, **_ENGINE, **_DEFECT}, route),
        },
    }
    return {"post": operation}


def _small_paths() -> Json:
    models = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}},
    }
    deletion = {403: "only fine-tuned models are deleted over HTTP, by their owner", **_NO_MODEL}
    deleted = {
        "type": "object",
        "required": ["id", "object", "deleted"],
        "properties": {"id": {"type": "string"}, "object": {"const": "model"}, "deleted": {"const": True}},
    }
    storage = {
        404: "no request with this id is stored",
        429: "too much feedback is being stored",
        503: "the request being rated has not been stored yet",
    }
    feedback = {**_BAD_BODY, **storage, **_DEFECT}
    health = _operation("Check whether the server accepts requests", _json(_OBJECT), {})
    health["responses"]["503"] = _answer("no engine is available, or the server is about to stop", _json(_OBJECT))
    page = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")}
    return {
        "/v1/models": {
            "get": _operation(
                "List the names of the served models, and the key's fine-tuned models", _json(models), _DEFECT
            )
        },
        "/v1/models/{name}": {
            "parameters": [_MODEL_NAME],
            "get": _operation(
                "Show a served model, or one of the key's fine-tuned models", _json(_ref("Model")), _NO_MODEL
            ),
            "delete": _operation("Delete one of the key's fine-tuned models", _json(deleted), deletion),
        },
        "/v1/feedback": {
            "post": {
                **_operation("Rate an answer", _json(_OBJECT), feedback),
                "requestBody": {"required": True, "content": _json(_ref("FeedbackRequest"))},
            }
        },
        "/health": {"get": health},
        "/health/live": {
            "get": _operation("Check whether the server is running, regardless of its engines", _json(_OBJECT), {})
        },
        "/metrics": {"get": _operation("Metrics for Prometheus", page, _DEFECT)},
        "/svc/status": {"get": _operation("Show the server's status, as in `svc status`", _json(_OBJECT), _DEFECT)},
        "/openapi.json": {"get": _operation("Show this document", _json(_OBJECT), {})},
    }


def _page(most: int) -> list[Json]:
    """Return the OpenAPI definitions of the query parameters that select a page of a list.

    See `serving.http.listing.requested_page`.
    """
    return [
        {"name": "after", "in": "query", "schema": {"type": "string"}},
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": most}},
        {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}},
    ]


def _files() -> Json:
    """Return the OpenAPI paths of the endpoints for files, which return objects in OpenAI's format."""
    store = {**_DEFECT, 503: "the server's database is not responding"}
    no_file = {404: "the file does not exist or belongs to another key", **store}
    expiry = {"expires_after[anchor]": {"const": "created_at"}, "expires_after[seconds]": {"type": "integer"}}
    form = {
        "type": "object",
        "required": ["file", "purpose"],
        "additionalProperties": False,
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"enum": [each.value for each in UPLOAD_PURPOSES]},
            **expiry,
        },
    }
    upload = {
        **_operation("Upload a file", _json(_OBJECT), {**_UPLOAD_REFUSED, **store}),
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
    }
    purpose = {"name": "purpose", "in": "query", "schema": {"type": "string"}}
    bad_page = {400: "a query parameter is invalid", 404: "the file in `after` does not exist"}
    listing = _operation("List files, newest first", _json(_OBJECT), {**store, **bad_page})
    deletion = {**no_file, 409: "an unfinished job or batch uses the file"}
    content = _operation("Download a file", {"application/octet-stream": {}}, {**no_file, **_RANGES})
    content["responses"]["206"] = _answer("the requested part of the file", {"application/octet-stream": {}})
    return {
        "/v1/files": {"post": upload, "get": {**listing, "parameters": [*_page(MAX_FILES), purpose]}},
        "/v1/files/{id}": {
            "parameters": [_ID],
            "get": _operation("Show a file", _json(_OBJECT), no_file),
            "delete": _operation("Delete a file", _json(_OBJECT), deletion),
        },
        "/v1/files/{id}/content": {"parameters": [_ID], "get": content},
    }


def _uploads(schemas: Json) -> Json:
    """Return the OpenAPI paths of the endpoints for uploads in parts, which return objects in OpenAI's format."""
    store = {**_DEFECT, 503: "the server's database is not responding"}
    no_upload = {400: "the upload has ended", 404: "the upload does not exist or belongs to another key", **store}
    form = {
        "type": "object",
        "required": ["data"],
        "additionalProperties": False,
        "properties": {"data": {"type": "string", "format": "binary"}},
    }
    creation = {
        **_operation("Create a multipart upload", _json(_OBJECT), {**_BAD_BODY, **store}),
        "requestBody": {"required": True, "content": _json(_schema(CreateUploadRequest, schemas))},
    }
    addition = {
        **_operation("Add a part to an upload", _json(_OBJECT), {**no_upload, **_UPLOAD_REFUSED}),
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
    }
    refused = {**no_upload, **_BAD_BODY, 429: _UPLOAD_REFUSED[429], 507: _UPLOAD_REFUSED[507]}
    completion = {
        **_operation("Combine the parts of an upload into a file", _json(_OBJECT), refused),
        "requestBody": {"required": True, "content": _json(_schema(CompleteUploadRequest, schemas))},
    }
    path = "/v1/uploads/{id}"
    return {
        "/v1/uploads": {"post": creation},
        f"{path}/parts": {"parameters": [_ID], "post": addition},
        f"{path}/complete": {"parameters": [_ID], "post": completion},
        f"{path}/cancel": {"parameters": [_ID], "post": _operation("Cancel an upload", _json(_OBJECT), no_upload)},
    }


def _batches(schemas: Json) -> Json:
    """Return the OpenAPI paths of the endpoints for batches, which return objects in OpenAI's format."""
    store = {**_DEFECT, 503: "the server's database is not responding"}
    no_batch = {404: "the batch does not exist or belongs to another key", **store}
    creation = {
        **_operation("Create a batch", _json(_OBJECT), {**_BAD_BODY, 429: "the key has too many batches", **store}),
        "requestBody": {"required": True, "content": _json(_schema(BatchRequest, schemas))},
    }
    bad_page = {400: "a query parameter is invalid", 404: "the batch in `after` does not exist"}
    listing = _operation("List batches, newest first", _json(_OBJECT), {**store, **bad_page})
    cancelling = _operation("Cancel a batch", _json(_OBJECT), {**no_batch, 400: "the batch has ended"})
    path = "/v1/batches"
    return {
        path: {"post": creation, "get": {**listing, "parameters": _page(MAX_BATCHES)}},
        f"{path}/{{id}}": {"parameters": [_ID], "get": _operation("Show a batch", _json(_OBJECT), no_batch)},
        f"{path}/{{id}}/cancel": {"parameters": [_ID], "post": cancelling},
    }


def _fine_tuning(schemas: Json) -> Json:
    """Return the OpenAPI paths of the endpoints for fine-tuning jobs, which return objects in OpenAI's format."""
    off = {403: "fine-tuning over HTTP is off", **_DEFECT, 503: "the server's database is not responding"}
    no_job = {404: "the job does not exist or belongs to another key", **off}
    id, page = _ID, _page(MAX_PAGE)
    bad_page = {400: "a query parameter is invalid", 404: "the job or the entry in `after` does not exist"}
    jobs = "/v1/fine_tuning/jobs"
    creation = {
        **_operation(
            "Create a fine-tuning job", _json(_OBJECT), {**_BAD_BODY, 429: "the key has too many jobs", **off}
        ),
        "requestBody": {"required": True, "content": _json(_schema(JobRequest, schemas))},
    }
    listing = _operation("List fine-tuning jobs, newest first", _json(_OBJECT), {**off, **bad_page})
    paths: Json = {
        jobs: {"post": creation, "get": {**listing, "parameters": page}},
        f"{jobs}/{{id}}": {"parameters": [id], "get": _operation("Show a fine-tuning job", _json(_OBJECT), no_job)},
    }
    for name in ("events", "checkpoints"):
        listing = _operation(f"List a job's {name}, newest first", _json(_OBJECT), {**no_job, **bad_page})
        paths[f"{jobs}/{{id}}/{name}"] = {"parameters": [id], "get": {**listing, "parameters": page}}
    for name in ("cancel", "pause", "resume"):
        change = _operation(f"{name.capitalize()} a job", _json(_OBJECT), {**no_job, 400: "the job has ended"})
        paths[f"{jobs}/{{id}}/{name}"] = {"parameters": [id], "post": change}
    return paths


def _administration(schemas: Json) -> Json:
    paths: Json = {
        path: {
            "post": {
                **_operation(summary, _json(_OBJECT), _CHANGE_REFUSED),
                "requestBody": {"required": True, "content": _json(_schema(kind, schemas))},
            }
        }
        for path, (summary, kind) in _CHANGES.items()
    }
    paths["/svc/keys"]["get"] = _operation("List all keys, without their secrets", _json(_OBJECT), _DEFECT)
    swap = _operation(
        "Show a model's last swap, or the swap for the given generation",
        _json(_OBJECT),
        {**_DEFECT, 400: "the generation is not a number"},
    )
    generation = {"type": "integer", "minimum": 1, "maximum": 999_999_999}
    swap["parameters"] = [_MODEL_NAME, {"name": "generation", "in": "query", "schema": generation}]
    paths["/svc/swaps/{name}"] = {"get": swap}
    rollouts = _operation("List all rollouts of a model, oldest first", _json(_OBJECT), _DEFECT)
    paths["/svc/rollouts/{name}"] = {"get": rollouts | {"parameters": [_MODEL_NAME]}}
    return paths


def _operation(summary: str, content: Json, errors: Mapping[int, str]) -> Json:
    return {"summary": summary, "responses": {"200": _answer(summary, content), **_errors(errors)}}


def _errors(descriptions: Mapping[int, str], path: str = "") -> Json:
    shape = _ref("MessagesError" if path in ANTHROPIC_PATHS else "Error")
    return {
        str(status): _answer(description, _json(shape))
        for status, description in sorted({**_KEYS, **descriptions, **_OTHER_HOST}.items())
    }


def _answer(description: str, content: Json) -> Json:
    request_id = {"x-request-id": {"schema": {"type": "string"}}}
    return {"description": description, "headers": request_id, "content": content}


def _json(schema: Json) -> Json:
    return {JSON: {"schema": schema}}


def _ref(name: str) -> Json:
    return {"$ref": f"{_SCHEMAS}{name}"}


_CODES = [code.value for code in ErrorCode if code not in (ErrorCode.CLIENT_GONE, ErrorCode.CLIENT_SLOW)]


def _error(types: list[str]) -> Json:
    return {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "additionalProperties": False,
        "properties": {
            "message": {"type": "string"},
            "type": {"enum": types},
            "param": {"type": ["string", "null"]},
            "code": {"enum": _CODES},
            **{part: {"type": "string"} for part in ("wrong", "expected", "todo")},  # administration only
        },
    }


_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {"error": _error(["invalid_request_error", "rate_limit_error", "server_error"])},
}
_MESSAGES_ERROR: Json = {
    **_ERROR,
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": _error(["invalid_request_error", "api_error", *ANTHROPIC_TYPES.values()]),
    },
}
_MODEL: Json = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}
