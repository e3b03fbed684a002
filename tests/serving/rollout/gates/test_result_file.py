"""Gates on results that Promptfoo and OpenAI Evals exported."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from serving.rollout.gates.result_file import ExportedResults, UnreadableError, check_result_file, read_results
from svc.store.gate_rows import GateRow, GateVerdict

DATA = Path(__file__).parents[3] / "data" / "gates"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def promptfoo(tmp_path: Path, **stats: int) -> Path:
    """Write the export of Promptfoo with other statistics."""
    content = json.loads((DATA / "promptfoo.json").read_text())
    content["results"]["stats"] = stats
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    return path


def check(path: Path, share: float = 0.9, registered_at: datetime = LONG_AGO) -> GateRow:
    return check_result_file("tests", path, share, registered_at)


def test_promptfoo_export_is_read() -> None:
    at = datetime(2025, 11, 21, 3, 27, 29, 157_000, tzinfo=UTC)
    assert read_results(DATA / "promptfoo.json") == ExportedResults("Promptfoo", 3, 3, at)


def test_openai_evals_log_is_read() -> None:
    at = datetime(2023, 4, 17, 22, 8, 21, 904_498, tzinfo=UTC)
    assert read_results(DATA / "oaieval.jsonl") == ExportedResults("openai/evals", 1, 3, at)


def run(**changes: Any) -> dict[str, Any]:
    """Return a run of OpenAI's Evals API, with the fields of its reference."""
    counts = {"total": 10, "errored": 0, "failed": 6, "passed": 4}
    return {"object": "eval.run", "status": "completed", "created_at": 1763640415, "result_counts": counts} | changes


def test_openai_evals_api_run_is_accepted_only_if_it_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run(), indent=2))
    assert read_results(path) == ExportedResults(
        "OpenAI Evals API", 4, 10, datetime(2025, 11, 20, 12, 6, 55, tzinfo=UTC)
    )
    path.write_text(json.dumps(run(status="queued")))
    with pytest.raises(UnreadableError, match="status"):
        read_results(path)


def test_tests_with_errors_count_as_failed(tmp_path: Path) -> None:
    results = read_results(promptfoo(tmp_path, successes=90, failures=5, errors=5))
    assert (results.passed, results.total) == (90, 100)
    assert read_results(promptfoo(tmp_path, successes=2, failures=1)).total == 3  # older exports


@pytest.mark.parametrize(
    ("passed", "verdict"),
    [(990, GateVerdict.PASSED), (905, GateVerdict.UNDECIDED), (800, GateVerdict.FAILED)],
)
def test_verdict_takes_the_confidence_interval_of_the_pass_rate_into_account(
    tmp_path: Path, passed: int, verdict: GateVerdict
) -> None:
    assert check(promptfoo(tmp_path, successes=passed, failures=1000 - passed)).verdict is verdict


def test_gate_with_too_few_tests_is_undecided_and_names_the_number_needed(tmp_path: Path) -> None:
    row = check(DATA / "promptfoo.json")
    assert row.verdict is GateVerdict.UNDECIDED
    assert row.measured.startswith("Promptfoo: 3 of 3 passed: 1.000 [0.4")
    assert row.limit == "at least 0.9 passed"
    assert row.reason.endswith("tests would decide")


def test_gate_is_undecided_if_the_results_are_older_than_the_registration() -> None:
    row = check(DATA / "promptfoo.json", 0.1, datetime(2026, 1, 1, tzinfo=UTC))
    assert row.verdict is GateVerdict.UNDECIDED
    assert row.reason == "run on 2025-11-21, before the version was registered"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no JSON",
        b"[]",
        b'{"results": []}',
        b'{"results": {"stats": {"successes": -1, "failures": 2}}}',
        b'{"results": {"stats": {"successes": 0, "failures": 0}}}',
        b'{"spec": {}}\n{"final_report": {"accuracy": 1.0}}',
        b'{"spec": {}}\nbroken',
        b'{"spec": {}}\n{"type": "match"}',
        b'{"spec": {}}\n[]',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_gate_with_an_unusable_result_file_fails_with_the_reason(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    row = check(path)
    assert row.verdict is GateVerdict.FAILED
    assert row.reason.startswith(f"{path}: ")


def test_gate_with_a_missing_result_file_fails(tmp_path: Path) -> None:
    assert check(tmp_path / "none.json").reason.endswith("No such file or directory")
