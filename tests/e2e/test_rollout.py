"""Rollouts on the real engine, under load of many users: good and bad candidates, kills and rollbacks in each state."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from svc.store.rollouts import RolloutOutcome, RolloutView
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance
from tests.e2e.json_versions import PROSE_ANSWER, add_json_version, prompts

pytestmark = [pytest.mark.slow]

PORT = 8951
# Small enough for a few hundred requests of a tiny model on two cores; the second engine takes cores from the first.
SETTINGS = {
    "min_units": "30",
    "max_step_s": "240",
    "max_errors": "0.1",
    "max_invalid": "0.1",
    "max_slowdown": "8",
}
STEPS = ("--shadow", "30", "--canary", "25,50,100")


class Users:
    """Load of the OpenAI client in which every request is another user's.

    Attributes:
        failed: errors of requests that failed.
        versions: version of each answer, in order.
    """

    def __init__(self, url: str, model: str, questions: list[str], streams: int = 4) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self._model, self._questions, self._streams = model, questions, streams
        self._numbers, self._stop = itertools.count(), threading.Event()
        self.failed: list[str] = []
        self.versions: list[str] = []

    @contextmanager
    def asking(self) -> Iterator["Users"]:
        threads = [threading.Thread(target=self._run) for _ in range(self._streams)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            self._client.close()

    def wait_for(self, answers: int, timeout_s: float = 120) -> None:
        """Wait for a number of further answers."""
        wanted, deadline = len(self.versions) + answers, time.monotonic() + timeout_s
        while len(self.versions) < wanted:
            assert time.monotonic() < deadline, (len(self.versions), wanted, self.failed[:3])
            time.sleep(0.05)

    def _run(self) -> None:
        while not self._stop.is_set():
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


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server of `teams`: version 1 and 3 answer in JSON, version 2 in 30 % of cases not."""
    folder = tmp_path_factory.mktemp("rollout") / "home"
    with pytest.MonkeyPatch.context() as patch, closing(Instance(home, folder, PORT, PROMPTS)) as instance:
        patch.setenv("SVC_MODELS", _models_json())  # `svc promote` reads it too
        add_json_version(folder, "teams")
        add_json_version(folder, "teams", urgent_answer=PROSE_ANSWER)
        add_json_version(folder, "teams")
        instance.start("teams@1")
        yield instance


def _models_json() -> str:
    values = ", ".join(f'"{key}": {value}' for key, value in SETTINGS.items())
    return f'{{"teams": {{"rollout": {{{values}}}}}}}'


def rollout(instance: Instance) -> RolloutView:
    done = instance.command("rollout", "teams", "--json")
    assert done.returncode == 0, done.stderr
    return RolloutView.model_validate_json(done.stdout)


def wait_for_state(instance: Instance, state: str, timeout_s: float = 240) -> Any:
    return instance.until(lambda status: (status["rollout"] or {}).get("state") == state, timeout_s)


def test_candidate_with_30_percent_invalid_json_is_rolled_back_without_a_failed_request(
    instance: Instance, report: Report
) -> None:
    with Users(instance.url, "teams", prompts(50)).asking() as users:
        users.wait_for(20)
        began = time.monotonic()
        done = instance.command("promote", "teams@2", "--canary", "25,50,100")
        took_s = time.monotonic() - began
    assert done.returncode == 21, (done.stdout, done.stderr)
    ended = rollout(instance)
    assert ended.outcome is RolloutOutcome.ROLLED_BACK, ended
    assert ended.why is not None and "invalid JSON" in ended.why
    assert users.failed == []
    exposed = users.versions.count("teams@2")
    report(f"30 % invalid JSON: rolled back after {took_s:.0f} s and {exposed} requests to the candidate: {ended.why}")


def test_good_candidate_goes_through_shadow_and_canary_without_a_failed_request(
    instance: Instance, report: Report
) -> None:
    with Users(instance.url, "teams", prompts(50)).asking() as users:
        users.wait_for(20)
        began = time.monotonic()
        done = instance.command("promote", "teams@3", *STEPS)
        took_s = time.monotonic() - began
        users.wait_for(20)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert rollout(instance).outcome is RolloutOutcome.PROMOTED
    assert users.failed == []
    assert users.versions[-1] == "teams@3"
    report(f"good candidate: promoted after {took_s:.0f} s, {users.versions.count('teams@3')} answers by it")
