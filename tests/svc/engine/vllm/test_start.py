"""Tests vLLM's start: a new process has its imports loaded, and gets the environment of its requester."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ENTRY = """
import gc, multiprocessing, os, sys, types

def look(connection):
    own = multiprocessing.get_context("spawn").Process(target=sys.exit, args=(5,))
    own.start()
    own.join()
    connection.send({
        "heavy": "heavy" in imported, "late": os.environ.get("LATE"), "early": os.environ.get("EARLY"),
        "parent": os.getppid(), "arguments": sys.argv[1:], "importer": sys.modules["entry"].importer,
        "files": [os.path.realpath(each) for each in os.scandir("/proc/self/fd")], "own_exit_code": own.exitcode,
        "collected_on_import": collected_on_import, "collects": gc.isenabled(), "ignored": gc.get_freeze_count(),
    })

importer = os.getpid()
imported = set(sys.modules)
collected_on_import = gc.isenabled()
registry = sys.modules.setdefault("vllm.model_executor.models.registry", types.ModuleType("registry"))

if __name__ == "__main__":
    os.environ["LATE"] = "yes"
    del os.environ["EARLY"]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=look, args=(theirs,))
    process.start()
    here = {"main": os.getpid(), "heavy_here": "heavy" in sys.modules, "collects_here": gc.isenabled()}
    here["inspector"] = registry._run_in_subprocess(os.getpid)
    print(__import__("json").dumps(ours.recv() | here))
    process.join()
    sys.exit(process.exitcode + 7)
"""


@pytest.fixture
def seen(tmp_path: Path) -> dict[str, Any]:
    """Return what an engine process observes when a started module requests it."""
    (tmp_path / "entry.py").write_text(ENTRY)
    (tmp_path / "heavy.py").touch()
    code = "from svc.engine.vllm.start import start; start('entry', ['heavy', 'of_another_release'])"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "EARLY": "yes"}
    with (tmp_path / "lock").open("w") as lock:
        ended = subprocess.run(
            [sys.executable, "-c", code, "--model", "x"],
            env=environment,
            pass_fds=[lock.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 7, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def test_engine_process_uses_the_modules_that_the_http_process_has_imported(seen: dict[str, Any]) -> None:
    assert seen["importer"] == seen["main"]


def test_model_class_is_inspected_in_the_process_that_has_imported_vllm(seen: dict[str, Any]) -> None:
    assert seen["inspector"] == seen["main"]


def test_preloaded_modules_are_already_imported_in_the_forked_engine_process(seen: dict[str, Any]) -> None:
    assert seen["heavy"]
    assert not seen["heavy_here"]
    assert seen["parent"] != seen["main"]


def test_forked_engine_process_uses_the_environment_of_the_fork_request(seen: dict[str, Any]) -> None:
    assert (seen["late"], seen["early"]) == ("yes", None)


def test_garbage_collector_runs_in_both_processes_but_not_during_imports(seen: dict[str, Any]) -> None:
    assert (seen["collected_on_import"], seen["collects"], seen["collects_here"]) == (False, True, True)
    assert seen["ignored"] > 0


def test_entry_module_and_engine_process_receive_the_command_line_arguments(seen: dict[str, Any]) -> None:
    assert seen["arguments"] == ["--model", "x"]


def test_lock_of_the_http_process_is_not_held_by_the_engine_process(seen: dict[str, Any]) -> None:
    assert not [file for file in seen["files"] if Path(file).name == "lock"]


def test_engine_process_can_start_processes_of_its_own(seen: dict[str, Any]) -> None:
    assert seen["own_exit_code"] == 5
