"""Checks a recipe with `svc estimate` in a separate process, because the server must not import the trainer.

The command reads the recipe, the examples and the base's config, but no weights.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svc.errors import BaseModelError, DataError, NotFoundError, RecipeError, SvcError
from svc.settings.settings import ENV_PREFIX, Settings

log = logging.getLogger(__name__)

_KINDS = {kind.exit_code: kind for kind in (DataError, RecipeError, BaseModelError, NotFoundError)}
_SETTINGS = {"home", "base_cache", "tracking_uri", "artifacts", "engine", "ray"}
_RECIPE_FILE = "recipe.yaml"
_ERROR = re.compile(
    r"^error: (?P<wrong>.*?)(?:\n  expected: (?P<expected>.*?))?(?:\n  do: .*)?\s*\Z", re.MULTILINE | re.DOTALL
)
"""Pattern of an error as the command line prints it; see svc.errors.SvcError."""


class CheckTimeoutError(SvcError):
    """Raised when the check of a recipe takes too long."""


class CheckFailedError(SvcError):
    """Raised when the check of a recipe fails for a reason that the client did not cause."""


@dataclass(frozen=True, slots=True)
class TrainingCheck:
    """Result of `svc estimate` for a recipe.

    Attributes:
        examples: number of training examples.
        learning_rate: learning rate of the recipe, or the default for its base and method.
        seconds: expected duration of training, in seconds.
        refused: reason why the run does not fit into this machine's memory, or None if it fits.
    """

    examples: int
    learning_rate: float
    seconds: float
    refused: str | None = None


async def check_training(recipe: str, settings: Settings, *, timeout_s: float) -> TrainingCheck:
    """Return the result of `svc estimate` for a recipe.

    Args:
        recipe: the recipe, as YAML.

    Raises:
        CheckTimeoutError: the command took longer than `timeout_s` seconds.
        DataError, RecipeError, BaseModelError, NotFoundError: `svc train` would fail with this error.
        CheckFailedError: the command failed for any other reason.
    """
    with tempfile.TemporaryDirectory(prefix="svc-check-") as folder:
        path = Path(folder) / _RECIPE_FILE
        path.write_text(recipe, "utf-8")
        command = (sys.executable, "-m", "svc.cli", "estimate", str(path), "--device", "here", "--json")
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,  # without a settings file
            env=command_environment(settings),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(timeout_s):
                output, errors = await process.communicate()
        except TimeoutError:
            raise CheckTimeoutError(f"the training check did not finish within {timeout_s:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all its children
            await process.wait()
    if process.returncode:
        raise _error(process.returncode, errors.decode("utf-8", "replace"), path)
    return _read(json.loads(output))


def command_environment(settings: Settings) -> dict[str, str]:
    """Return the environment for a training command. It includes those settings of this process that training
    uses, even if they were not set through environment variables.

    The store's password is not passed on, because training does not use the store.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
    values = settings.model_dump(mode="json", include=_SETTINGS, exclude_unset=True) | {"home": str(settings.home)}
    own = {
        ENV_PREFIX + name.upper(): value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
    }
    return inherited | own


def _read(estimate: Mapping[str, Any]) -> TrainingCheck:
    here = estimate["devices"][0]
    return TrainingCheck(
        examples=estimate["data"]["examples"],
        learning_rate=estimate["learning_rate"],
        seconds=here["seconds"],
        refused=estimate["refused"],
    )


def _error(code: int, output: str, recipe: Path) -> SvcError:
    """Return the error that a command printed."""
    printed, kind = _ERROR.search(output), _KINDS.get(code)
    if printed is None or kind is None:
        return CheckFailedError(f"`svc estimate` exited with code {code}: {output[-2000:]}")
    return kind(printed["wrong"].replace(f"{recipe}: ", ""), expected=printed["expected"] or "")
