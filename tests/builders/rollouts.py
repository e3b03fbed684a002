"""Builds rollouts of a server over engine doubles, and the users whose requests are compared."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from serving.rollout.promotion import PromotionRequest, VersionChange
from serving.rollout.version_changes import VersionChanges
from svc.settings.rollout import RolloutSettings
from svc.settings.settings import ModelSettings
from svc.store.rollouts import (
    RolloutRecord,
    find_rollout,
)
from svc.version import Format
from tests.builders.actors import ANN
from tests.serving.control import BODY, Control, until
from tests.serving.versions import NAME, target
from tests.svc.chats import chat

ONE, JSON_ONE = f"{NAME}@1", f"{NAME}@11"
ALL = RolloutSettings(
    shadow=20, canary=(25, 50, 100), min_units=20, max_step_s=30, max_errors=0.2, max_invalid=0.2, max_slowdown=50
)
JSON = tuple(chat(f"question {number}", '{"team": "billing"}') for number in range(3))


@dataclass
class Users:
    """Many users, each with its own conversation and one or two requests.

    Attributes:
        statuses: HTTP status of each answer.
        versions: version that answered each user.
    """

    client: httpx.AsyncClient
    statuses: list[int] = field(default_factory=list)
    versions: dict[str, set[str]] = field(default_factory=dict)

    @asynccontextmanager
    async def asking(self, concurrent: int = 4) -> AsyncIterator["Users"]:
        """Send requests during the body of the `with`."""
        numbers, stop = itertools.count(), asyncio.Event()

        async def ask_on() -> None:
            while not stop.is_set():
                user = f"user {next(numbers)}"
                for _ in range(random.choice((1, 2))):
                    response = await self.client.post("/v1/chat/completions", json=BODY | {"user": user})
                    self.statuses.append(response.status_code)
                    self.versions.setdefault(user, set()).add(response.headers.get("x-model-version", ""))

        tasks = [asyncio.create_task(ask_on()) for _ in range(concurrent)]
        try:
            yield self
        finally:
            stop.set()
            await asyncio.gather(*tasks)


def changes(control: Control, plan: RolloutSettings) -> VersionChanges:
    """Return the changes of versions with which rollouts are requested."""
    served = control.reconciler.actual.target
    return VersionChanges(
        control.registry, control.store, lambda: {NAME: served}, lambda name: ModelSettings(rollout=plan)
    )


def start(control: Control, number: int, plan: RolloutSettings = ALL, format: Format | None = None) -> VersionChange:
    """Request the rollout of a version."""
    version = target(number).version
    return changes(control, plan).promote(PromotionRequest(version, format, reason="better"), ANN)


def record(control: Control) -> RolloutRecord:
    """Return the latest rollout."""
    found = find_rollout(control.store, NAME)
    assert found is not None
    return found


async def ended(control: Control, timeout_s: float = 30.0) -> RolloutRecord:
    """Wait until the latest rollout has ended, and return it."""
    await until(lambda: record(control).outcome is not None, timeout_s, every_s=0.03)  # a look takes 2 ms
    return record(control)
