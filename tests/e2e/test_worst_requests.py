"""Tests that the worst accepted bodies, and random ones, block vLLM's front end for at most half a second.

The front end is one thread for all clients. The time it is blocked shows in its responses to concurrent
health checks.
"""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from serving.protocols.request import InvalidRequestError, parse_request
from serving.protocols.route import Route
from svc.engine.vllm.folders import socket_folder, state_folders
from svc.engine.vllm.launch import SOCKET_FILE
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance
from tests.serving.protocols.worst_bodies import WorstBody, random_body, worst_bodies

pytestmark = [pytest.mark.matrix]

PORT = 8954
MAX_BLOCKED_S = 0.5
RANDOM_BODIES = 60
_PAUSE_S = 0.002


class Front:
    """Measures how long an engine's front end delays responses to health checks on separate connections."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._latest_s = 0.0
        self._end = threading.Event()

    def run(self) -> None:
        """Send health checks until stopped."""
        while not self._end.is_set():
            began = time.monotonic()
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(60)
                connection.connect(self._path)
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: engine\r\nconnection: close\r\n\r\n")
                assert connection.recv(64).startswith(b"HTTP/1.1 200")
            self._latest_s = max(self._latest_s, time.monotonic() - began)
            time.sleep(_PAUSE_S)

    def end(self) -> None:
        """Stop sending health checks."""
        self._end.set()

    @contextmanager
    def held(self, delays: list[float]) -> Iterator[None]:
        """Append the longest response time measured while the context is active."""
        self._latest_s = 0.0
        yield
        time.sleep(2 * _PAUSE_S)
        delays.append(self._latest_s)


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a separate server, so that measurements of other tests are not affected."""
    with closing(Instance(home, tmp_path_factory.mktemp("worst") / "home", PORT, PROMPTS)) as instance:
        instance.start("tiny@1")
        yield instance


@pytest.fixture(scope="module")
def front(instance: Instance) -> Iterator[Front]:
    """Yield the health-check monitor of the engine's front end."""
    (number,) = state_folders(instance.home)
    front = Front(socket_folder(instance.home, number) / SOCKET_FILE)
    asking = threading.Thread(target=front.run)
    asking.start()
    yield front
    front.end()
    asking.join()


def seconds_held(instance: Instance, front: Front, worst: WorstBody) -> float:
    """Return how many seconds a request body blocks the front end."""
    delays = list[float]()
    with front.held(delays):
        answer = httpx.post(
            f"{instance.url}{worst.route}",
            content=worst.body("tiny"),
            headers={"content-type": "application/json"},
            timeout=120,
            trust_env=False,
        )
        assert answer.status_code in (200, 400), answer.text
    return delays[0]


def test_most_expensive_valid_requests_block_the_vllm_front_end_only_briefly(
    instance: Instance, front: Front, report: Report
) -> None:
    held = {f"{worst.route} {worst.name}": seconds_held(instance, front, worst) for worst in worst_bodies()}
    worst_first = sorted(held.items(), key=lambda one: -one[1])
    for name, seconds in worst_first[:5]:
        report(f"front of vLLM held for {seconds * 1000:.0f} ms: {name}")
    assert worst_first[0][1] < MAX_BLOCKED_S


def test_random_valid_request_bodies_block_the_vllm_front_end_only_briefly(
    instance: Instance, front: Front, report: Report
) -> None:
    chance, held, refused = random.Random(0), list[float](), 0
    while len(held) < RANDOM_BODIES:
        worst = random_body(chance)
        try:
            parse_request(worst.body("tiny"), Route(worst.route))
        except InvalidRequestError:
            refused += 1
            continue
        held.append(seconds_held(instance, front, worst))
    report(f"front of vLLM, {len(held)} random bodies: held for {max(held) * 1000:.0f} ms at most; {refused} refused")
    assert max(held) < MAX_BLOCKED_S
