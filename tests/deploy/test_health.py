"""Tests that the image's health check queries the server of the home and fails without a response."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from svc.remote.server_url import LOCK_FILE
from tests.deploy.deploy_files import DEPLOY
from tests.serving.socket_server import running_in_thread


async def live(scope: Scope, receive: Receive, send: Send) -> None:
    status = 200 if Request(scope).url.path == "/health/live" else 404
    await Response(status_code=status)(scope, receive, send)


def healthy(home: Path) -> bool:
    command = [sys.executable, str(DEPLOY / "docker" / "health.py")]
    return subprocess.run(command, env=os.environ | {"SVC_HOME": str(home)}, timeout=30, check=False).returncode == 0


@pytest.mark.slow
def test_responding_server_is_healthy(tmp_path: Path) -> None:
    socket = tmp_path / "http.sock"
    (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": 1, "url": "https://x:8000", "socket": str(socket)}))
    with running_in_thread(live, socket):
        assert healthy(tmp_path)
    assert not healthy(tmp_path)


def test_health_check_fails_if_no_server_was_ever_started(tmp_path: Path) -> None:
    assert not healthy(tmp_path)
