"""Tests the machine and duration of a training, as stored with the version."""

import os
import platform
from pathlib import Path

import pytest

from svc.errors import IntegrityError
from svc.files.json_file import read_record
from trainer.model.run_record import MachineRecord, RunRecord


def test_machine_record_describes_the_current_machine() -> None:
    machine = MachineRecord.of_this_one()
    assert machine.processor
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.memory > 2**28
    assert machine.python == platform.python_version()


def test_written_run_record_round_trips(tmp_path: Path) -> None:
    record = RunRecord(
        machine=MachineRecord.of_this_one(),
        number_type="bfloat16",
        steps=3,
        tokens=30,
        tokens_per_second=10.0,
        seconds=3.0,
    )
    path = tmp_path / "run.json"
    path.write_text(record.model_dump_json(), "utf-8")
    assert read_record(path, RunRecord) == record


@pytest.mark.parametrize("content", [None, "{", '{"steps": 1}'])
def test_file_that_is_not_a_run_record_is_rejected(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(IntegrityError, match=r"run\.json"):
        read_record(path, RunRecord)
