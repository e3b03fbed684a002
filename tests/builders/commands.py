"""Runs `svc` commands for a home in the current process."""

import asyncio
from typing import Any

from click.testing import CliRunner, Result

from svc.cli import group
from svc.errors import SvcError
from svc.remote.server_url import read_status, server_address
from tests.serving.home import Home


def type_now(home: Home, *arguments: str, answers: str | None = None) -> Result:
    """Run a command, with answers to what it asks."""
    return CliRunner().invoke(group, ["--home", str(home.settings.home), *arguments], input=answers)


async def type_in(home: Home, *arguments: str, answers: str | None = None) -> Result:
    """Run a command in a thread, while the server runs."""
    return await asyncio.to_thread(type_now, home, *arguments, answers=answers)


def error_of(result: Result) -> SvcError:
    """Return the error that a command failed with."""
    assert isinstance(result.exception, SvcError), result
    return result.exception


def models_of(home: Home) -> list[dict[str, Any]]:
    """Return the models listed in the server's status."""
    return list(read_status(server_address(home.settings))["models"])
