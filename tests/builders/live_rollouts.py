"""Builds rollouts of a running server, and the users whose requests are compared."""

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

from svc.store.rollouts import RolloutState, RolloutView, find_rollout
from tests.e2e.instance import Instance

PLAN = {"min_units": 30, "max_step_s": 240, "max_errors": 0.1, "max_invalid": 0.1, "max_slowdown": 2.5}
"""Limits that a few hundred requests of a tiny model can decide."""
BY_REQUEST = PLAN | {"unit": "request", "min_units": 100}
"""Limits for requests, because users would be observed for a minute each. A step still lasts a few seconds."""
# A core for each of the two engines of a rollout: threads of both that compete for two cores slow both to a quarter.
SETTINGS = {
    "SVC_MODELS": json.dumps({"teams": {"rollout": BY_REQUEST}, "tiny": {"rollout": PLAN}}),
    "SVC_ENGINE__CORES": "1",
}


class Users:
    """Load of the OpenAI client in which every request is another user's.

    Attributes:
        pause_s: pause before each of a stream's requests, in seconds. It may be changed at any time.
        failed: errors of requests that failed.
        versions: version of each answer, in order.
    """

    def __init__(self, url: str, model: str, questions: list[str], streams: int = 4, pause_s: float = 0.0) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self._model, self._questions, self._streams, self.pause_s = model, questions, streams, pause_s
        self._numbers, self._stop = itertools.count(), threading.Event()
        self.failed: list[str] = []
        self.versions: list[str] = []

    @contextmanager
    def asking(self) -> Iterator["Users"]:
        """Send requests while the context is active."""
        threads = [threading.Thread(target=self._run) for _ in range(self._streams)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.stop()
            for thread in threads:
                thread.join()
            self._client.close()

    def stop(self) -> None:
        """Send no further requests."""
        self._stop.set()

    def wait_for(self, answers: int, timeout_s: float = 120) -> None:
        """Wait for a number of further answers."""
        wanted, deadline = len(self.versions) + answers, time.monotonic() + timeout_s
        while len(self.versions) < wanted:
            assert time.monotonic() < deadline, (len(self.versions), wanted, self.failed[:3])
            time.sleep(0.05)

    def _run(self) -> None:
        while not self._stop.wait(self.pause_s):
            number = next(self._numbers)
            question = self._questions[number % len(self._questions)]
            try:
                raw = self._client.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=[{"role": "user", "content": question}],
                    user=f"user {number}",
                    max_tokens=16,
                    temperature=0,
                    stream=True,
                )
                for chunk in raw.parse():
                    del chunk
                self.versions.append(raw.headers["x-model-version"])
            except openai.OpenAIError as error:
                self.failed.append(repr(error))


def python_path(first: Path) -> str:
    """Return the search path for modules that begins with a folder."""
    return os.pathsep.join(filter(None, (str(first), os.environ.get("PYTHONPATH"))))


def latest(instance: Instance, name: str = "teams") -> RolloutView:
    """Return the latest rollout of a model, from the store, because the server may be down."""
    record = find_rollout(instance.store(), name)
    assert record is not None
    return RolloutView.of(record)


def wait_for_state(instance: Instance, state: RolloutState, name: str = "teams", timeout_s: float = 240) -> None:
    """Wait until the latest rollout of a model is in a state."""
    deadline = time.monotonic() + timeout_s
    store = instance.store()
    while (record := find_rollout(store, name)) is None or record.state is not state:
        assert time.monotonic() < deadline, record
        time.sleep(0.02)
