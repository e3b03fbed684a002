"""Tests the command line: immediate help, errors as text with their exit codes, and no unneeded libraries."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from svc import cli
from svc.dataset.readers.reader import write_examples
from svc.errors import SvcError
from tests.builders.error_types import kinds
from tests.command_line import Svc
from tests.svc.chats import chat

HEAVY = ("torch", "transformers", "vllm")
NOT_FOR_HELP = (*HEAVY, "mlflow", "fastapi", "sklearn", "scipy")


def loaded_after(code: str) -> set[str]:
    """Return the top-level packages loaded in a fresh interpreter after it has run the code."""
    report = "\nimport json, sys; print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_help_option_imports_no_heavy_library() -> None:
    code = "import sys; sys.argv = ['svc', '--help']\nfrom svc.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert not loaded_after(code) & set(NOT_FOR_HELP)


@pytest.mark.slow
def test_importing_the_service_packages_does_not_import_torch() -> None:
    assert not loaded_after("import svc.cli, serving, monitoring, svc.registry.registry") & set(HEAVY)


@pytest.mark.slow
def test_loading_the_cli_commands_does_not_import_heavy_libraries() -> None:
    code = "from svc.cli import COMMANDS, LazyGroup\nfor name in COMMANDS: LazyGroup().get_command(None, name)"
    assert not loaded_after(code) & set(HEAVY)


def test_help_lists_all_commands(svc: Svc) -> None:
    result = svc("--help")
    assert result.code == 0
    assert all(name in result.out and text in result.out for name, (_, text) in cli.COMMANDS.items())


@pytest.mark.slow
def test_every_command_has_help(svc: Svc) -> None:
    results = {command: svc(command, "-h") for command in cli.COMMANDS}
    assert [name for name, help in results.items() if help.code or f"svc {name}" not in help.out] == []


def add_failing_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Add a command `fail` that raises the given error."""

    @click.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(sys.modules[__name__], "failing", fail, raising=False)
    monkeypatch.setitem(cli.COMMANDS, "fail", (f"{__name__}:failing", "Fails."))


def test_service_error_is_printed_as_text_and_determines_the_exit_code(
    svc: Svc, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "error: the disk is on fire\n  expected: a cool disk\n  do: call somebody\n"
    results = {}
    every: list[type[SvcError]] = [SvcError, *kinds()]
    for kind in every:
        add_failing_command(monkeypatch, kind("the disk is on fire", expected="a cool disk", todo="call somebody"))
        results[kind] = svc("fail")
    assert [kind for kind, end in results.items() if (end.code, end.err, end.out) != (kind.exit_code, text, "")] == []


def test_unexpected_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    add_failing_command(monkeypatch, ZeroDivisionError())
    monkeypatch.setattr(sys, "argv", ["svc", "fail"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_keyboard_interrupt_exits_with_130(svc: Svc, monkeypatch: pytest.MonkeyPatch) -> None:
    add_failing_command(monkeypatch, KeyboardInterrupt())
    result = svc("fail")
    assert result.code == 130
    assert "interrupted" in result.err


SLOW_COMMAND = """
import asyncio, click, sys
from svc import cli

@click.command()
def wait():
    async def forever():
        try:
            print("waiting", flush=True)
            await asyncio.sleep(60)
        finally:
            print("cleaned up", flush=True)
    asyncio.run(forever())

cli.group.get_command = lambda ctx, name: wait
sys.argv = ["svc", "wait"]
cli.main()
"""


@pytest.mark.slow
def test_command_cleans_up_and_exits_with_130_on_sigterm() -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW_COMMAND], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.terminate()
        assert process.stdout.read() == "cleaned up\n"
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("existed", [False, True])
def test_home_folder_and_its_contents_have_owner_only_permissions(tmp_path: Path, existed: bool) -> None:
    home = tmp_path / "home"
    if existed:
        home.mkdir()
        home.chmod(0o755)
    subprocess.run([sys.executable, "-m", "svc.cli", "--home", home, "models"], check=True, capture_output=True)
    assert [path for path in (home, *home.rglob("*")) if path.stat().st_mode & 0o077] == []


@pytest.mark.slow
def test_home_folder_created_by_an_older_release_gets_owner_only_permissions(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    subprocess.run([sys.executable, "-m", "svc.cli", "--home", tmp_path / "home", "status"], capture_output=True)
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["data", "check", "none.jsonl"], 3, "cannot open data file none.jsonl"),
        (["train", "none.yaml"], 4, "cannot open recipe none.yaml"),
        (["show", "nobody"], 8, "there is no model 'nobody'"),
        (["show", "nobody@1"], 8, "there is no version nobody@1"),
        (["show", "nobody@latest"], 8, "'nobody@latest' is not a valid version"),
        (["show", "/etc"], 8, "there is no model '/etc'"),
        (["show", ""], 8, "there is no model ''"),
        (["show", "*"], 8, "there is no model '*'"),
        (["status"], 13, "no server is running for the home"),
        (["--config", "none.yaml", "status"], 2, "cannot read settings from none.yaml"),
        (["dance"], 2, "No such command 'dance'"),
        (["show"], 2, "Missing argument"),
        (["train", "--fast"], 2, "No such option"),
    ],
)
def test_failed_command_exits_with_the_code_of_its_error_and_prints_no_traceback(
    svc: Svc, arguments: list[str], code: int, text: str
) -> None:
    result = svc(*arguments)
    assert result.code == code
    assert text in result.err
    assert "Traceback" not in result.err + result.out


def test_command_fails_if_an_unknown_svc_environment_variable_is_set(svc: Svc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVC_HOEM", "x")
    result = svc("status")
    assert result.code == 2
    assert "SVC_HOEM" in result.err


def test_home_option_overrides_the_environment_variable(
    svc: Svc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SVC_HOME", "below")
    assert f"no server is running for the home folder {tmp_path / 'above'}" in svc("--home", "above", "status").err


@pytest.mark.slow
def test_failed_command_in_a_subprocess_prints_an_error_instead_of_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "svc.cli", "data", "check", "none.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: cannot open data file none.jsonl")


def test_empty_model_list_says_how_to_create_a_model(svc: Svc) -> None:
    assert "svc train RECIPE" in svc("models").out


def test_empty_model_list_is_printed_as_an_empty_json_list(svc: Svc) -> None:
    assert json.loads(svc("models", "--json").out) == []


def data_check(svc: Svc, path: Path, *options: str | Path) -> tuple[int, Any]:
    result = svc("data", "check", path, "--json", *options)
    return result.code, json.loads(result.out)


def test_data_check_of_valid_data_exits_with_0(svc: Svc, tmp_path: Path) -> None:
    write_examples(tmp_path / "good.jsonl", [chat("a"), chat("b")])
    code, reports = data_check(svc, tmp_path / "good.jsonl")
    assert (code, reports[0]["examples"], reports[0]["errors"]) == (0, 2, 0)


def test_data_check_of_invalid_data_exits_with_1_and_names_the_line(svc: Svc, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(chat().as_dict()) + "\n{}\n")
    code, reports = data_check(svc, tmp_path / "bad.jsonl")
    assert (code, [problem["line"] for problem in reports[0]["problems"]]) == (1, [2])


def test_data_check_with_only_warnings_exits_with_0(svc: Svc, tmp_path: Path) -> None:
    write_examples(tmp_path / "twice.jsonl", [chat("a"), chat("a")])
    assert data_check(svc, tmp_path / "twice.jsonl")[0] == 0


def test_data_check_with_held_out_leakage_exits_with_1(svc: Svc, tmp_path: Path) -> None:
    write_examples(tmp_path / "train.jsonl", [chat("a"), chat("b")])
    write_examples(tmp_path / "heldout.jsonl", [chat("b")])
    assert data_check(svc, tmp_path / "train.jsonl", "--heldout", tmp_path / "heldout.jsonl")[0] == 1


def test_data_check_prints_the_line_number_of_a_problem(svc: Svc, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(chat().as_dict()) + "\n{}\n")
    result = svc("data", "check", tmp_path / "bad.jsonl")
    assert result.code == 1
    assert "1 examples in 2 lines" in result.out
    assert "line 2: error: the line has no 'messages', only []" in result.out
