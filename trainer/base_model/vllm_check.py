"""Checks from the config alone whether vLLM can serve a model, by running vLLM's validation in another process.

The check takes 8 s, mostly for importing vLLM, so callers start it, do other work and read the result later. The other
process runs this file as a module. Since no weights are read, a model that is too large for the memory still passes.
"""

import gc
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from svc.engine.device import installed_vllm
from svc.engine.vllm.environment import inherited_environment
from svc.engine.vllm.launch import HUGGING_FACE_FORMAT
from svc.engine.vllm.start import inspect_models_in_this_process
from svc.errors import BaseModelError, EngineError
from svc.settings.engine import EngineSettings

_TIMEOUT_S = 300.0
_MAX_REASON = 160  # characters; vLLM lists all architectures that it has


class ModelCheck:
    """A running check of whether vLLM can serve a model.

    Args:
        folder: folder of the model.
        command: command line of the process.
        process: the process, which prints vLLM's reason for rejecting the model as a JSON string, or null if vLLM
            accepts the model.
    """

    def __init__(self, folder: Path, command: Sequence[str], process: "subprocess.Popen[str]") -> None:
        self._folder = folder
        self._command = command
        self._process = process

    def wait(self) -> None:
        """Wait up to 300 seconds for the result of the check.

        Raises:
            BaseModelError: vLLM cannot serve the model; the error contains vLLM's reason.
            EngineError: vLLM did not start or did not return a result.
        """
        try:
            answer, log = self._process.communicate(timeout=_TIMEOUT_S)
            reason = json.loads(answer)
        except (subprocess.TimeoutExpired, ValueError) as error:
            lines = log.strip().splitlines() if isinstance(error, ValueError) else []
            raise EngineError(
                f"vLLM could not check the model in {self._folder}: {lines[-1] if lines else error}",
                expected="a report from vLLM on whether it can serve the model",
                todo=f"run `{shlex.join(self._command)}` to see the full error",
            ) from error
        if reason is not None:
            raise BaseModelError(
                f"vLLM {installed_vllm()[1]} cannot serve the model in {self._folder}: {reason}",
                expected="an architecture that vLLM supports, with a config that it accepts",
                todo="choose another base, train only the adapter (formats: [adapter]), or check engine.args",
            )


@contextmanager
def model_check(folder: Path, settings: EngineSettings) -> Iterator[ModelCheck]:
    """Context manager that starts a model check, and stops it on exit if it is still running.

    Args:
        settings: engine settings. Their `args` and `environment` apply as they would to an engine that
            serves the model.
    """
    command = [sys.executable, "-m", __name__, "--model", str(folder), *HUGGING_FACE_FORMAT, *settings.args]
    environment = inherited_environment(settings.environment) | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield ModelCheck(folder, command, process)
        finally:
            process.kill()


def _refusal(arguments: Sequence[str]) -> str | None:
    """Return vLLM's reason for rejecting a model, shortened, or None if vLLM can serve the model."""
    from pydantic import ValidationError
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    inspect_models_in_this_process()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    known, _ = parser.parse_known_args(list(arguments))  # the server's own arguments do not concern the model
    try:
        EngineArgs.from_cli_args(known).create_model_config()
    except ValidationError as error:
        return "; ".join(_shortened(str(detail["msg"])) for detail in error.errors())
    except (ValueError, TypeError, KeyError, OSError, NotImplementedError, RuntimeError) as error:
        return _shortened(f"{type(error).__name__}: {error}")
    return None


def _shortened(reason: str) -> str:
    text = " ".join(reason.removeprefix("Value error, ").split())
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}…"


if __name__ == "__main__":
    gc.disable()  # importing creates hardly any garbage, see svc/imports.py
    # vLLM logs to standard output, and native code may write there too.
    answer_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.write(answer_to, json.dumps(_refusal(sys.argv[1:])).encode("utf-8"))
