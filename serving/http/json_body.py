"""Reads and validates the small JSON bodies that this server parses itself. Unknown keys are rejected."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from serving.engines.model_names import SHOWN_CHARS
from serving.http.body import read_body
from serving.http.request_state import request_state
from serving.protocols.request import InvalidJsonError, InvalidRequestError

Body = TypeVar("Body", bound=BaseModel)


async def read_json(request: Request, kind: type[Body], *, max_bytes: int, expected: str) -> Body:
    """Parse and validate a request's JSON body, and return it.

    Args:
        expected: example of a valid body, shown in errors.

    Raises:
        InvalidJsonError, InvalidRequestError: the body is not valid.
        MediaTypeError, BodyTooLargeError, BodyTimeoutError, ClientGoneError: see `read_body`.
    """
    body = await read_body(request_state(request.scope).headers, request.receive, max_bytes=max_bytes)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise InvalidJsonError(f"the request body is not valid JSON: {first['msg']}") from error
        param = ".".join(str(part) for part in first["loc"])[:SHOWN_CHARS]
        raise InvalidRequestError(
            f"'{param}' is invalid: {first['msg']}" if param else first["msg"], param=param, expected=expected
        ) from error
