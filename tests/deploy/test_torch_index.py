"""Tests that pip gets PyTorch's index only if it responds, because pip would otherwise retry for minutes."""

import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.deploy.deploy_files import DEPLOY

SCRIPT = DEPLOY / "constraints" / "torch_index.py"


class Index(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/cpu/torch/" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run_script(index: str) -> tuple[list[str], str]:
    """Return the pip arguments and the human-readable message that the script prints."""
    # Without site-packages, as before the installation.
    done = subprocess.run(
        [sys.executable, "-S", SCRIPT],
        env={"TORCH_INDEX": index},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "/"])
def test_reachable_torch_index_is_passed_to_pip(address: str, end: str) -> None:
    assert run_script(f"{address}/cpu{end}") == (["--extra-index-url", f"{address}/cpu{end}"], "")


@pytest.mark.slow
def test_index_without_torch_is_not_passed_to_pip(address: str) -> None:
    arguments, message = run_script(f"{address}/other")
    assert arguments == []
    assert f"{address}/other is not responding" in message


@pytest.mark.slow
@pytest.mark.parametrize("index", ["http://127.0.0.1:1/cpu", "download.pytorch.org/whl/cpu", "http://a b/cpu"])
def test_unreachable_torch_index_is_not_passed_to_pip(index: str) -> None:
    arguments, message = run_script(index)
    assert arguments == []
    assert "is not responding" in message
