"""Checks results exported by other tools: the share of passed tests and its 95% confidence interval.

Three file formats are recognized by their content:

- Promptfoo (`promptfoo eval -o results.json`): `results.stats` with `successes`, `failures` and, in newer exports,
  `errors`.
- openai/evals (`oaieval`, JSON lines): one `match` event with `correct` per sample.
- OpenAI's Evals API (`GET /v1/evals/EVAL/runs/RUN`): `result_counts` of an `eval.run`.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AliasPath, BaseModel, Field, ValidationError

from svc.evaluation.intervals import Interval, proportion
from svc.evaluation.verdict import verdict_of
from svc.store.gate_rows import GateRow, GateVerdict

_MAX_BYTES = 64 * 2**20
"""Maximum size of a result file, in bytes. Parsing a larger file would block the server's other threads for too
long."""


@dataclass(frozen=True, slots=True)
class ExportedResults:
    """Results of running a set of tests.

    Attributes:
        total: number of tests, including tests that ended with an error, which are counted as failed.
        at: when the tests were run, or None if the file does not say.
    """

    tool: str
    passed: int
    total: int
    at: datetime | None


class UnreadableError(Exception):
    """Raised when a file is missing or is not in a known format. The message is the reason."""


class _Promptfoo(BaseModel):
    at: datetime | None = Field(None, validation_alias=AliasPath("results", "timestamp"))
    successes: int = Field(ge=0, validation_alias=AliasPath("results", "stats", "successes"))
    failures: int = Field(ge=0, validation_alias=AliasPath("results", "stats", "failures"))
    errors: int = Field(0, ge=0, validation_alias=AliasPath("results", "stats", "errors"))


class _EvalRun(BaseModel):
    status: Literal["completed"]
    created_at: datetime
    passed: int = Field(ge=0, validation_alias=AliasPath("result_counts", "passed"))
    total: int = Field(ge=0, validation_alias=AliasPath("result_counts", "total"))


class _Log(BaseModel):
    at: datetime | None = Field(None, validation_alias=AliasPath("spec", "created_at"))


class _Event(BaseModel):
    type: str = ""


class _Match(BaseModel):
    correct: bool = Field(validation_alias=AliasPath("data", "correct"))


def check_result_file(name: str, path: Path, min_pass_share: float, registered_at: datetime) -> GateRow:
    """Return the result of the gate that requires a minimum share of passed tests in a result file.

    If the file cannot be read, the gate fails.

    Args:
        registered_at: when the version was registered. Older results belong to another version.
    """
    limit = f"at least {min_pass_share:g} passed"
    try:
        results = read_results(path)
    except UnreadableError as error:
        return GateRow(gate=name, limit=limit, verdict=GateVerdict.FAILED, reason=f"{path}: {error}")
    share = proportion(results.passed, results.total)
    measured = f"{results.tool}: {results.passed} of {results.total} passed: {share}"
    if results.at is not None and results.at < registered_at:
        reason = f"run on {results.at:%Y-%m-%d}, before the version was registered"
        return GateRow(gate=name, measured=measured, limit=limit, verdict=GateVerdict.UNDECIDED, reason=reason)
    loss = Interval(value=1 - share.value, low=1 - share.high, high=1 - share.low)
    verdict = verdict_of(loss, 1 - min_pass_share, results.total)
    more = f"about {verdict.examples_to_decide} tests would decide" if verdict.examples_to_decide else ""
    return GateRow(gate=name, measured=measured, limit=limit, verdict=GateVerdict(verdict.outcome), reason=more)


def read_results(path: Path) -> ExportedResults:
    """Read test results from a file that another tool exported.

    Raises:
        UnreadableError: the file is missing, too large, in an unknown format, or contains no results.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UnreadableError(f"the file is larger than {_MAX_BYTES // 2**20} MiB")
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    try:
        results = _parse(content)
    except (ValueError, RecursionError) as error:  # includes JSON, Unicode and pydantic's errors
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise UnreadableError(f"not a Promptfoo or OpenAI Evals export: {text}") from error
    if not 0 <= results.passed <= results.total or not results.total:
        raise UnreadableError(f"{results.passed} of {results.total} tests passed")
    return results


def _parse(content: bytes) -> ExportedResults:
    if content.startswith(b'{"spec"'):
        return _oaieval(content.splitlines())
    whole = json.loads(content)
    if isinstance(whole, dict) and whole.get("object") == "eval.run":
        run = _EvalRun.model_validate(whole)
        return ExportedResults("OpenAI Evals API", run.passed, run.total, run.created_at)
    stats = _Promptfoo.model_validate(whole)
    total = stats.successes + stats.failures + stats.errors
    return ExportedResults("Promptfoo", stats.successes, total, _utc(stats.at))


def _oaieval(lines: list[bytes]) -> ExportedResults:
    at = _Log.model_validate_json(lines[0]).at
    events = [line for line in lines[1:] if line.strip() and _Event.model_validate_json(line).type == "match"]
    matches = [_Match.model_validate_json(line) for line in events]
    return ExportedResults("openai/evals", sum(match.correct for match in matches), len(matches), _utc(at))


def _utc(at: datetime | None) -> datetime | None:
    """Return a timezone-aware time, assuming UTC if the given time has no offset, as in files of openai/evals."""
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at
