"""Worker program that calls a user's metric function. It must not import anything from this project.

    python function_worker.py FILE FUNCTION SECONDS < {"answers": [...], "references": [...], "prompts":
    [...]}

It writes {"scores": [...]} or {"error": TEXT}. Anything that the function prints goes to stderr.
"""

import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
from typing import Any

_LINES = 8
_SPARE_S = 10


def main(path: str, function: str, seconds: str) -> None:
    """Read the answers, references and prompts from stdin, call the metric function and print its scores or error."""
    signal.alarm(int(seconds) + _SPARE_S)  # stops this process if its parent was killed
    given = json.load(sys.stdin)
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        output: dict[str, Any] = {"scores": _call(path, function, given)}
    except BaseException as error:  # noqa: BLE001 - the boundary of this process: the caller gets the error
        output = {"error": _tail(error)}
    sys.stdout.flush()
    with os.fdopen(answer, "w") as out:
        json.dump(output, out)
    os._exit(0)  # threads that the function left would hold the process


def _call(path: str, function: str, given: dict[str, Any]) -> list[float]:
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    score = getattr(module, function)
    texts = [given["answers"], given["references"]]
    if len(inspect.signature(score).parameters) > 2:
        texts.append(given["prompts"])
    returned = score(*texts)
    if isinstance(returned, str | bytes | dict):  # their parts are not scores
        raise TypeError(f"{function} must return a list of numbers, got {returned!r:.80}")
    try:
        return [float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function} must return a list of numbers, got {returned!r:.80}: {error}") from None


def _tail(error: BaseException) -> str:
    """Return the last lines of an error's traceback, skipping frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    lines = "".join(traceback.format_exception(type(error), error, frames)).splitlines()
    return "\n".join(lines[-_LINES:])


if __name__ == "__main__":
    main(*sys.argv[1:])
