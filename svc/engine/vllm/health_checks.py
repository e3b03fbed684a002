"""Checks an engine's health every few seconds, over a connection that stays open between checks.

Opening a new connection with an HTTP library took 3 ms of CPU time per check: checking twenty engines every two seconds
cost as much as 150 requests per second. For an engine on another machine, each check also required a TLS handshake.
"""

import asyncio

from svc.engine.address import EngineAddress
from svc.engine.client import HEALTH_TIMEOUT_S
from svc.engine.vllm.connection import ConnectionFailedError
from svc.engine.vllm.connection_pool import EngineConnections


class HealthChecks:
    """Sends health checks to one engine. Implements svc.engine.client.StatusChecks."""

    def __init__(self, address: EngineAddress) -> None:
        self._connections = EngineConnections(address, silence_s=HEALTH_TIMEOUT_S)

    async def status(self) -> int:
        """Return the HTTP status of the engine's response to a health check.

        Raises:
            OSError: the engine is not responding.
        """
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S), self._connections.get("/health") as answer:
                await answer.read()  # so that the connection can be used again
                return answer.status
        except ConnectionFailedError as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        """Close the connection."""
        self._connections.close()
