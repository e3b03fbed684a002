"""A home with a registry and a store, and `svc serve` running on it with doubles instead of vLLM."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.rollout.initial_state import choose_deployments
from serving.server import server
from serving.server.assembly import assemble
from svc.errors import SvcError
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.store.desired import change_desired, read_desired
from svc.store.swaps import SwapResult, find_swap
from svc.version import Format, VersionId
from tests.new_store import new_store
from tests.serving.control import until
from tests.serving.engine_park import EnginePark, ParkSlots
from tests.serving.versions import NAME, AliasBook, make_version, target
from tests.svc.engine.devices import AVX512


class Home:
    """A home with versions 1, 2 and 3.

    Args:
        folder: path of the home.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = Settings.model_validate({"home": folder, "serve": {"port": 0}})
        self.book = AliasBook()
        self.registry = Registry(folder / "models", self.book)
        for number in (1, 2, 3):
            make_version(self.registry, number)
        self.store = new_store(folder)
        self.park = EnginePark(folder)
        self.ready = asyncio.Event()
        self.failures: list[SvcError] = []
        monkeypatch.setattr(Registry, "of", lambda settings: self.registry)
        # A process that imports torch and vLLM would be asked.
        monkeypatch.setattr("svc.engine.device.read_capabilities", lambda home: AVX512)

    def configure(self, **settings: Any) -> None:
        """Replace the settings.

        Args:
            settings: sections that differ from the defaults. The port stays a free one.
        """
        serve = {"port": 0} | settings.pop("serve", {})
        self.settings = Settings.model_validate({"home": self.settings.home, "serve": serve} | settings)

    def hash_slowly(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        """Delay every comparison of a version's files with its manifest."""
        verify = self.registry.verify

        def verify_slowly(version: VersionId, format: Format) -> None:
            time.sleep(seconds)
            verify(version, format)

        monkeypatch.setattr(self.registry, "verify", verify_slowly)

    async def promote(self, number: int) -> SwapResult:
        """Promote a version of the first model and return the result of the swap."""
        seen = read_desired(self.store, NAME)
        assert seen is not None
        wish = change_desired(self.store, seen, target(number), seen.target)
        await until(lambda: (swap := find_swap(self.store, NAME, wish.generation)) and swap.result)
        swap = find_swap(self.store, NAME, wish.generation)
        assert swap is not None and swap.result is not None
        return swap.result

    async def serve(self, claim: server.Claim, *models: str) -> None:
        """Serve as `svc serve` does after it has claimed the home."""
        self.ready.clear()
        needed = not self.settings.fine_tuning.bases
        wanted = choose_deployments(self.registry, self.store, models, None, needed=needed)
        if not wanted:
            self.ready.set()
        parts = assemble(
            self.settings,
            self.registry,
            self.store,
            AVX512,
            on_phase=lambda phase: None,
            on_ready=lambda target: self.ready.set(),
            on_failure=lambda target, error: self.failures.append(error),
            make_slots=partial(ParkSlots, self.park),
        )
        await server.serve(parts, self.settings.serve, wanted, claim)

    @asynccontextmanager
    async def serving(self, *models: str) -> AsyncIterator[httpx.AsyncClient]:
        """Run a server while the context is active, with one model ready."""
        with server.claim(self.settings) as claim:
            task = asyncio.create_task(self.serve(claim, *models))
            waiting = asyncio.create_task(self.ready.wait())
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            try:
                async with httpx.AsyncClient(base_url=claim.url, timeout=10) as client:
                    yield client
            finally:
                task.cancel()
                await asyncio.wait({task})
        assert self.park.alive == 0
