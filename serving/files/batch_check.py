"""Checks a file of requests for a batch, one JSON object per line, as in OpenAI's Batch API."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from svc.dataset.problem.problem import Code
from svc.dataset.readers.jsonl import read_jsonl
from svc.dataset.readers.row import MAX_ROW_BYTES

BATCH_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_REQUESTS = 50_000
MAX_CUSTOM_ID = 256
MAX_PROBLEMS = 100
_MAX_MODELS = 100
_MAX_MODEL = 512
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchProblem:
    """A problem in a file of requests.

    Attributes:
        code: kind of the problem, as in OpenAI's batch errors.
        line: line number, starting at 1, or None if the problem concerns the whole file.
        param: name of the field that causes the problem, or None if no single field does.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class BatchFileCheck:
    """Result of checking a file of requests.

    Attributes:
        requests: number of requests, all of which are valid if there are no problems.
        endpoints: the API paths to which the valid requests are addressed.
        models: the first 100 models that the valid requests name.
        problems: the first 100 problems.
        more_problems: whether there may be more problems. If a file has too many requests or problems, reading stops
            before its end.
    """

    requests: int
    endpoints: frozenset[str]
    models: tuple[str, ...]
    problems: tuple[BatchProblem, ...] = ()
    more_problems: bool = False


class _LineError(Exception):
    """Raised for a line that is not a valid request."""

    def __init__(self, message: str, param: str | None, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


def check_batch_file(path: Path) -> BatchFileCheck:
    """Check a file of requests. Blank lines are skipped. Memory is bounded by the longest line.

    Raises:
        OSError: the file cannot be read.
    """
    requests, ids, endpoints = 0, set[str](), set[str]()
    models: dict[str, None] = {}  # in the order of the file
    problems: list[BatchProblem] = []
    for number, value in _lines(path):
        requests += 1
        if requests > MAX_REQUESTS:
            problems.append(BatchProblem("too_many_requests", f"the file has more than {MAX_REQUESTS} requests"))
            break
        if len(problems) == MAX_PROBLEMS:
            return BatchFileCheck(requests, frozenset(endpoints), tuple(models), tuple(problems), more_problems=True)
        try:
            if isinstance(value, _LineError):
                raise value
            custom_id, url, model = _read_request(value)
            if custom_id in ids:
                raise _LineError(f"custom_id {custom_id[:64]!a} occurs twice", "custom_id", "duplicate_custom_id")
        except _LineError as error:
            problems.append(BatchProblem(error.code, error.message, number, error.param))
        else:
            ids.add(custom_id)
            endpoints.add(url)
            if len(models) < _MAX_MODELS:
                models[model] = None
    if not requests:
        problems.append(BatchProblem("empty_file", "the file has no requests"))
    return BatchFileCheck(requests, frozenset(endpoints), tuple(models), tuple(problems))


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield, for each line that is not blank, its number and its JSON value or the error."""
    with path.open("rb") as file:
        for row in read_jsonl(file):
            if row.error is not None:
                too_large = row.error.code is Code.TOO_LARGE
                wrong = f"the line is larger than {MAX_ROW_BYTES} bytes" if too_large else row.error.wrong
                yield row.number, _LineError(wrong, None, "invalid_json_line")
            elif not row.blank:
                yield row.number, row.value


def _read_request(value: Any) -> tuple[str, str, str]:
    """Return the id, path and model of the request in a line's parsed JSON."""
    if not isinstance(value, dict):
        raise _LineError("the line is not a JSON object", None, "invalid_json_line")
    for key in _FIELDS:
        if key not in value:
            raise _LineError(f"the line lacks {key!r}", key, "missing_required_parameter")
    custom_id, method, url, body = (value[key] for key in _FIELDS)
    if not _is_text(custom_id, MAX_CUSTOM_ID):
        raise _LineError(f"custom_id is not a string of 1 to {MAX_CUSTOM_ID} characters", "custom_id")
    if method != "POST":
        raise _LineError("method is not 'POST'", "method", "invalid_method")
    if url not in BATCH_ENDPOINTS:
        raise _LineError(f"url is not one of {', '.join(BATCH_ENDPOINTS)}", "url", "invalid_url")
    if not isinstance(body, dict):
        raise _LineError("body is not a JSON object", "body")
    model = body.get("model")
    if not _is_text(model, _MAX_MODEL):
        raise _LineError("body.model is not the name of a model", "body.model")
    return custom_id, url, model


def _is_text(value: Any, most: int) -> TypeGuard[str]:
    """Return whether a value is a string of 1 to `most` characters that UTF-8 and PostgreSQL can represent."""
    if not isinstance(value, str) or not 1 <= len(value) <= most or "\0" in value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)
