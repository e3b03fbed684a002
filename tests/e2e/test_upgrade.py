"""Tests replacing a server on a service manager's socket, and backing it up while it serves, with real
vLLM, real processes and the official client.
"""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from signal import SIGTERM, SIGUSR1

import openai
import pytest

from examples.load import Load
from examples.service import svc_json
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance
from tests.service_manager import ServiceManager, service_manager

pytestmark = [pytest.mark.slow]

RESTARTS = 2


class Managed(Instance):
    """A server instance started by a service manager."""

    def __init__(self, home: Path, folder: Path, manager: ServiceManager) -> None:
        super().__init__(home, folder, 0, PROMPTS)
        self.url = manager.url
        self._manager = manager

    def move_to(self, home: Path) -> None:
        """Use this home for the next server that is launched."""
        (home / "logs").mkdir()
        self.home = home

    def launch(self, *models: str) -> "subprocess.Popen[bytes]":
        """Start the server on the service manager's socket."""
        command = [str(Path(sys.executable).with_name("svc")), "--home", str(self.home), "serve", *models]
        with self._log.open("ab") as output:
            self._process = self._manager.start(command, output, self.settings)
        return self._process


@pytest.fixture(scope="module")
def managed(first_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    """Yield a server with version 1 in production."""
    with (
        tempfile.TemporaryDirectory(prefix="svc") as folder,
        service_manager(Path(folder)) as manager,
        closing(Managed(first_home, tmp_path_factory.mktemp("upgrade") / "home", manager)) as managed,
    ):
        managed.start("tiny@1")
        yield managed


def test_upgrade_under_load_refuses_no_connection_and_keeps_the_engine_running(
    managed: Managed, report: Report
) -> None:
    """Needs the real engine: its answers go on while the server that started it is replaced."""
    expected, engines, errors = managed.answers(), managed.engines(), list[str]()
    asked, ended = 0, threading.Event()

    def ask_over_new_connections() -> None:
        nonlocal asked
        while not ended.is_set():
            try:
                with openai.OpenAI(base_url=f"{managed.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
                    client.models.list()
                asked += 1
            except openai.OpenAIError as error:
                errors.append(repr(error))

    asking = threading.Thread(target=ask_over_new_connections)
    asking.start()
    with Load(managed.url, "tiny", managed.prompts) as load:
        load.wait_for(16)
        for _ in range(RESTARTS):
            assert managed.end(SIGUSR1) == 0
            managed.start()
            load.wait_for(16)
    ended.set()
    asking.join()
    longest = max(answer.seconds for answer in load.answers)
    report(
        f"{RESTARTS} upgrades under load: {len(load.answers)} answers, the longest in {longest:.1f} s, and {asked} "
        f"requests over new connections; {len(load.failed) + len(errors)} failed"
    )
    assert (load.failed, errors) == ([], [])
    assert {(answer.version, answer.text) for answer in load.answers} <= set(expected)
    assert managed.engines() == engines


@pytest.mark.matrix
def test_server_restored_from_a_backup_taken_under_load_gives_the_same_answers(
    managed: Managed, tmp_path: Path, report: Report
) -> None:
    expected = managed.answers()
    with Load(managed.url, "tiny", managed.prompts) as load:
        load.wait_for(8)
        began = time.monotonic()
        made = svc_json(managed.home, "backup", str(tmp_path / "backups"))
        report(f"a backup under load: {time.monotonic() - began:.1f} s, {len(made['copied'])} versions")
        load.wait_for(8)
    assert load.failed == []
    assert managed.end(SIGTERM) == 0  # the machine has cores for one engine only
    restored = tmp_path / "home"
    svc_json(restored, "restore", str(tmp_path / "backups"))
    svc_json(restored, "audit", "--verify")
    managed.move_to(restored)
    managed.start()
    assert managed.answers() == expected
