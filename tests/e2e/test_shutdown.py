"""Stops the server shared by the tests in this folder. Because of its name, this file runs last."""

import json
import os
import signal
import time

import psutil
import pytest

from examples.service import engine_pid, svc
from tests.e2e.server import Server

pytestmark = [pytest.mark.slow]


def test_server_stops_its_engine_on_a_stop_signal(server: Server) -> None:
    pid = engine_pid(server.home)
    holder = json.loads((server.home / "serve.lock").read_text("utf-8"))["pid"]
    os.kill(holder, signal.SIGTERM)
    psutil.wait_procs([psutil.Process(holder)] if psutil.pid_exists(holder) else [], timeout=30)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not psutil.pid_exists(pid)
    assert svc(server.home, "status", capture_output=True).returncode == 13
