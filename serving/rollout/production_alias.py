"""Keeps MLflow's `production` alias pointing at the served version.

This runs in its own task, because MLflow may be slow or down and must not delay an engine or a swap.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from svc.errors import SvcError
from svc.registry.tracking import Tracking
from svc.version import Alias, VersionId

log = logging.getLogger(__name__)

_RETRY_S = 5.0


class ProductionAlias:
    """Keeps the `production` alias of one model up to date in MLflow.

    Args:
        leads: function that returns whether this server is the model's leader. If there are several servers, only the
            leader writes the alias.
    """

    def __init__(self, tracking: Tracking, leads: Callable[[], bool] = lambda: True) -> None:
        self._tracking = tracking
        self._leads = leads
        self._wanted: VersionId | None = None
        self._moved = asyncio.Event()
        self._settled = asyncio.Event()

    async def read(self, name: str) -> VersionId | None:
        """Return the version that MLflow's alias points at, or None if there is none or MLflow is not responding."""
        try:
            return await asyncio.to_thread(self._tracking.alias, name, Alias.PRODUCTION)
        except Exception as error:  # MLflow raises the errors of its transport
            log.warning("could not read the production alias of %s: %s", name, error, exc_info=_is_defect(error))
            return None

    def move(self, version: VersionId) -> None:
        """Point the alias at a version, in the background."""
        self._wanted = version
        self._settled.clear()
        self._moved.set()

    async def settled(self, timeout_s: float) -> bool:
        """Wait until MLflow has stored the alias. Return False if that takes longer than `timeout_s`, or immediately if
        another server is responsible for it.
        """
        if not self._leads():
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        return self._settled.is_set()

    async def run(self) -> None:
        """Keep the alias up to date until cancelled.

        Only one write is made at a time, so that no older version overwrites a newer one.
        """
        while True:
            await self._moved.wait()
            if not self._leads():
                await asyncio.sleep(_RETRY_S)
                continue
            self._moved.clear()
            version = self._wanted
            assert version is not None  # noqa: S101 - `move` sets both
            try:
                await asyncio.to_thread(self._tracking.set_alias, version, Alias.PRODUCTION)
            except Exception as error:  # a defect of MLflow's client, too: the alias is written again later
                text = "MLflow did not set the production alias to %s; retrying: %s"
                log.warning(text, version, error, exc_info=_is_defect(error))
                self._moved.set()
                await asyncio.sleep(_RETRY_S)
            else:
                if not self._moved.is_set():
                    self._settled.set()


def _is_defect(error: Exception) -> bool:
    """Return whether an error is a bug in this program, so that its traceback is worth logging. Tracebacks of MLflow's
    own errors contain its server's URL, which may include a password.
    """
    return not isinstance(error, SvcError)
