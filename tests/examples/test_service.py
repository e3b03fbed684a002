"""Tests that stopping a script that runs `svc` also stops the command, after it has saved its work."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

COMMAND = """#!/bin/sh
trap 'sleep 1; touch "$2/saved"; exit 130' INT TERM
sleep 0.5
touch "$2/started"
while :; do sleep 0.05; done
"""
"""Command that takes longer to save than Python's own `subprocess.run` waits before killing it.

It counts as started after half a second: a signal that arrives while Python is still inside `Popen` finds no child to
stop, which happened once on a busy machine.
"""

SCRIPT = """
import sys
from pathlib import Path
from examples import service
service._SVC = Path(sys.argv[1])
service.Terminated.on_sigterm()
try:
    service.svc(Path(sys.argv[2]), "train")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("all_of_them", [True, False], ids=["Ctrl-C in a terminal", "SIGTERM to the script alone"])
def test_command_run_by_an_example_script_saves_its_work_when_the_script_is_interrupted(
    tmp_path: Path, all_of_them: bool
) -> None:
    command = tmp_path / "svc"
    command.write_text(COMMAND)
    command.chmod(0o755)
    script = subprocess.Popen([sys.executable, "-c", SCRIPT, command, tmp_path], start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if all_of_them:
            os.killpg(script.pid, signal.SIGINT)
        else:
            script.send_signal(signal.SIGTERM)
        assert script.wait(30) == 130
        assert (tmp_path / "saved").exists()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
