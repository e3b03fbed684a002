"""Runs gates that an operator configures, each of which is a command, a Python function or a result file.

Commands and functions come only from the settings. Neither a client nor a version can choose them.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from serving.rollout.gates import entry_point
from serving.rollout.gates.result_file import check_result_file
from svc.settings.gates import CommandGate, CustomGate, EntryPointGate, ResultFileGate
from svc.settings.load import environment_without_store
from svc.store.gate_rows import GateRow, GateVerdict
from svc.version import Target

_MAX_TEXT = 300
"""Maximum length, in characters, of each text that a gate returns."""


class _Output(BaseModel):
    """JSON output of a gate's command or function. All keys are optional."""

    model_config = ConfigDict(extra="ignore")

    measured: str = ""
    limit: str = ""
    verdict: GateVerdict = GateVerdict.PASSED
    reason: str = ""


def check_custom(
    gate: CustomGate, candidate: Target, production: Target, folder: Path, registered_at: datetime
) -> GateRow:
    """Run a configured gate and return its result. A gate that cannot be run counts as failed.

    Args:
        folder: the candidate's folder in the registry.
        registered_at: when the candidate was registered.
    """
    match gate:
        case CommandGate():
            return _run(gate.name, gate.command, gate.timeout_s, _environment(candidate, production, folder))
        case EntryPointGate():
            # -m: modules in the working folder can be imported, besides installed ones.
            command = (sys.executable, "-m", entry_point.__name__, gate.entry_point)
            return _run(gate.name, command, gate.timeout_s, _environment(candidate, production, folder))
        case ResultFileGate():
            path = Path(str(gate.result_file).replace("{version}", str(candidate.version)))
            return check_result_file(gate.name, path, gate.min_pass_share, registered_at)


def _environment(candidate: Target, production: Target, folder: Path) -> dict[str, str]:
    return {
        **environment_without_store(),
        "GATE_VERSION": str(candidate.version),
        "GATE_FORMAT": candidate.format.value,
        "GATE_FOLDER": str(folder),
        "GATE_PRODUCTION": str(production.version),
    }


def _run(name: str, command: tuple[str, ...], timeout_s: float, environment: dict[str, str]) -> GateRow:
    try:
        process = subprocess.Popen(  # without a shell
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return _failed(name, f"cannot run {command[0]}: {error}")
    with process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return _failed(name, f"did not finish within {timeout_s:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all its children
    if process.returncode not in (0, 1):
        return _failed(name, f"exit code {process.returncode}: {_last_line(errors)}")
    return _row(name, output, process.returncode)


def _row(name: str, output: bytes, code: int) -> GateRow:
    try:
        result = _Output.model_validate_json(output)
    except ValidationError:
        try:
            json.loads(output)
        except ValueError:
            result = _Output(measured=_last_line(output))  # a script that prints text
        else:
            return _failed(name, f"the printed JSON is not a valid gate result: {_last_line(output)}")
    return GateRow(
        gate=name,
        measured=_clean(result.measured),
        limit=_clean(result.limit),
        verdict=GateVerdict.FAILED if code else result.verdict,
        reason=_clean(result.reason),
    )


def _failed(name: str, reason: str) -> GateRow:
    return GateRow(gate=name, verdict=GateVerdict.FAILED, reason=_clean(reason))


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return _clean(lines[-1]) if lines else ""


def _clean(text: str) -> str:
    """Return a text as a single line, cut to the maximum length."""
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
