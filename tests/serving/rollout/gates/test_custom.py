"""Gates that an operator configures: commands, functions and result files."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serving.rollout.gates.custom import check_custom
from svc.errors import SettingsError
from svc.settings.gates import CommandGate, CustomGate, EntryPointGate, ResultFileGate
from svc.settings.load import load_settings
from svc.store.gate_rows import GateRow, GateVerdict
from tests.serving.versions import target

NOW = datetime(2020, 1, 1, tzinfo=UTC)


def check(gate: CustomGate, folder: Path = Path("models/tuned/2")) -> GateRow:
    return check_custom(gate, target(2), target(1), folder, NOW)


def python(code: str, timeout_s: float = 30.0) -> CommandGate:
    """Return a gate that runs Python code."""
    return CommandGate(name="mine", command=(sys.executable, "-c", code), timeout_s=timeout_s)


def test_gate_command_passes_with_exit_code_0_and_fails_with_exit_code_1() -> None:
    assert check(python("")) == GateRow(gate="mine", verdict=GateVerdict.PASSED)
    assert check(python("raise SystemExit(1)")).verdict is GateVerdict.FAILED


def test_json_output_of_a_gate_command_sets_the_fields_of_the_gate_result() -> None:
    output = '{"measured": "12 ms", "limit": "10 ms", "verdict": "undecided", "reason": "noise", "more": 1}'
    assert check(python(f"print('{output}')")) == GateRow(
        gate="mine", measured="12 ms", limit="10 ms", verdict=GateVerdict.UNDECIDED, reason="noise"
    )


def test_gate_command_with_exit_code_1_fails_even_if_its_json_says_passed() -> None:
    row = check(python("""print('{"measured": "x", "verdict": "passed"}'); raise SystemExit(1)"""))
    assert (row.verdict, row.measured) == (GateVerdict.FAILED, "x")


def test_last_line_of_plain_text_gate_output_becomes_the_measured_value() -> None:
    assert check(python("print('starting'); print('3 of 3 passed')")).measured == "3 of 3 passed"


def test_gate_command_with_an_invalid_json_result_fails() -> None:
    row = check(python("""print('{"verdict": "great"}')"""))
    assert row.verdict is GateVerdict.FAILED
    assert "is not a valid gate result" in row.reason


def test_gate_command_receives_the_version_and_runs_without_a_shell() -> None:
    code = "import os; print(os.environ['GATE_VERSION'], os.environ['GATE_PRODUCTION'], os.environ['GATE_FOLDER'])"
    assert check(python(code)).measured == "tuned@2 tuned@1 models/tuned/2"
    gate = CommandGate(name="mine", command=("echo", "$GATE_VERSION; exit 1"))
    assert check(gate).measured == "$GATE_VERSION; exit 1"


def test_gate_command_does_not_receive_the_store_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVC_STORE__URL", "postgresql://svc:s3cret@db/store")
    assert check(python("import os; print('SVC_STORE__URL' in os.environ)")).measured == "False"


def test_gate_fails_and_gives_the_reason_if_its_command_crashes_or_cannot_run() -> None:
    assert "cannot run ./none" in check(CommandGate(name="mine", command=("./none",))).reason
    row = check(python("import sys; sys.exit('out of memory')"))  # Python exits with 1
    assert row.verdict is GateVerdict.FAILED
    row = check(python("import sys; print('out of memory', file=sys.stderr); sys.exit(3)"))
    assert (row.verdict, row.reason) == (GateVerdict.FAILED, "exit code 3: out of memory")


@pytest.mark.slow
def test_gate_command_that_times_out_fails_and_is_stopped_with_its_child_processes() -> None:
    code = "import subprocess; subprocess.run(['sleep', '60'])"
    row = check(python(code, timeout_s=0.5))
    assert (row.verdict, row.reason) == (GateVerdict.FAILED, "did not finish within 0.5 s")


def test_long_output_of_a_gate_command_is_truncated() -> None:
    assert len(check(python("""print('{"measured": "' + 'x' * 1000 + '"}')""")).measured) == 300


def test_lone_surrogate_in_gate_output_fails_the_gate_but_invalid_bytes_are_replaced() -> None:
    assert check(python(r"""print(r'{"measured": "\ud800"}')""")).verdict is GateVerdict.FAILED
    assert check(python("import sys; sys.stdout.buffer.write(bytes([255]))")).measured == "\ufffd"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the working folder."""
    code = """
def passes(version, folder):
    print("noise")
    return {"verdict": "passed", "measured": f"{version} in {folder.name}"}

def fails(version, folder):
    return False

def breaks(version, folder):
    raise LookupError("no such test")
"""
    (tmp_path / "own_gates.py").write_text(code)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("module")
def test_gate_entry_point_is_called_with_version_and_folder() -> None:
    row = check(EntryPointGate(name="mine", entry_point="own_gates:passes"))
    assert (row.verdict, row.measured) == (GateVerdict.PASSED, "tuned@2 in 2"), row.reason


@pytest.mark.slow
@pytest.mark.usefixtures("module")
def test_gate_fails_if_its_entry_point_returns_false_or_raises() -> None:
    assert check(EntryPointGate(name="mine", entry_point="own_gates:fails")).verdict is GateVerdict.FAILED
    row = check(EntryPointGate(name="mine", entry_point="own_gates:breaks"))
    assert (row.verdict, row.reason) == (
        GateVerdict.FAILED,
        "exit code 2: own_gates:breaks: LookupError: no such test",
    )


def test_result_file_path_may_contain_a_version_placeholder(tmp_path: Path) -> None:
    (tmp_path / "tuned@2.json").write_text('{"results": {"stats": {"successes": 200, "failures": 0}}}')
    gate = ResultFileGate(name="mine", result_file=tmp_path / "{version}.json", min_pass_share=0.9)
    assert check(gate).verdict is GateVerdict.PASSED


def test_custom_gate_type_is_inferred_from_its_setting_keys(tmp_path: Path) -> None:
    path = tmp_path / "svc.yaml"
    path.write_text(
        "models: {tuned: {gates: {custom: [{name: a, command: [x]}, {name: b, entry_point: m:f}, "
        "{name: c, result_file: r.json, min_pass_share: 0.9}]}}}"
    )
    custom = load_settings(path).model_settings("tuned").gates.custom
    assert [type(gate).__name__ for gate in custom] == ["CommandGate", "EntryPointGate", "ResultFileGate"]


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ("[{name: a}]", "must have one of the keys command, entry_point and result_file"),
        ("[{name: a, command: [x], entry_point: m:f}]", "entry_point"),
        ("[{name: a, entry_point: m}]", "entry_point"),
        ("[{name: a, command: []}]", "command"),
        ("[{name: a, command: [x]}, {name: a, command: [y]}]", "must have different names"),
    ],
)
def test_invalid_custom_gates_are_rejected(tmp_path: Path, gates: str, message: str) -> None:
    path = tmp_path / "svc.yaml"
    path.write_text(f"models: {{tuned: {{gates: {{custom: {gates}}}}}}}")
    with pytest.raises(SettingsError, match=message):
        load_settings(path)
