"""Tests `svc serve` and `svc chat` on the command line."""

import os
import signal
import threading
import time
from functools import partial

import httpx
import pytest

from serving.server import assembly
from svc.errors import BusyError, NotFoundError, ServerNotRunningError
from svc.remote.server_url import server_address
from svc.store.desired import read_desired
from tests.builders.commands import error_of, type_in, type_now
from tests.serving.engine_park import ParkSlots
from tests.serving.home import Home
from tests.serving.versions import NAME, target

pytestmark = pytest.mark.slow


def test_serve_command_rejects_model_names_combined_with_the_all_option(home: Home) -> None:
    assert "MODELS and --all cannot be combined" in type_now(home, "serve", NAME, "--all").output


def test_promote_rollback_and_chat_commands_fail_if_no_server_is_running(home: Home) -> None:
    cases: list[tuple[str, str]] = [("promote", f"{NAME}@2"), ("rollback", NAME), ("chat", NAME)]
    for command in cases:
        assert isinstance(error_of(type_now(home, *command)), ServerNotRunningError), command


async def test_chat_continues_until_an_empty_line(serving: Home) -> None:
    result = await type_in(serving, "chat", NAME, answers="hello\nand then?\n\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("1.0 1.1 1.2 1.3") == 2


async def test_chat_ends_at_end_of_input(serving: Home) -> None:
    assert (await type_in(serving, "chat", NAME, answers="")).exit_code == 0


def test_serve_command_runs_until_it_is_stopped(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "assemble", partial(assembly.assemble, make_slots=partial(ParkSlots, home.park)))
    answers = list[int]()

    def visit() -> None:
        deadline = time.monotonic() + 60  # a signal before the server handles it would end the tests
        while time.monotonic() < deadline and not answers:
            try:
                with server_address(home.settings).client(2) as client:
                    health = client.get("/health")
            except (ServerNotRunningError, httpx.HTTPError):
                time.sleep(0.02)
                continue
            if health.status_code == 200:
                answers.append(health.status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    visitor = threading.Thread(target=visit)
    visitor.start()
    result = type_now(home, "serve", f"{NAME}@2", "--port", "0")
    visitor.join()
    assert (result.exit_code, result.exception, answers) == (0, None, [200])
    assert home.park.alive == 0
    with pytest.raises(ServerNotRunningError):
        server_address(home.settings)


async def test_serve_command_starts_no_engine_if_another_server_uses_the_home_folder(serving: Home) -> None:
    error = error_of(await type_in(serving, "serve", f"{NAME}@2", "--port", "0"))
    assert isinstance(error, BusyError)
    assert len(serving.park.engines) == 1
    desired = read_desired(serving.store, NAME)
    assert desired is not None and desired.target == target(1)


def test_serve_command_starts_no_engine_if_the_model_does_not_exist(home: Home) -> None:
    assert isinstance(error_of(type_now(home, "serve", f"{NAME}@9", "--port", "0")), NotFoundError)
    assert home.park.engines == []
