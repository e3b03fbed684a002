"""The program that runs an entry-point gate.

It calls `MODULE:FUNCTION(version, folder)` and prints the result as JSON. The function returns whether the gate passed,
or a dictionary with `verdict`, `measured`, `limit` and `reason`. Anything that the function prints is sent to stderr.
"""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main(target: str) -> None:
    """Call the gate's function and print its result as JSON."""
    module, _, name = target.partition(":")
    with contextlib.redirect_stdout(sys.stderr):
        function = getattr(importlib.import_module(module), name)
        result = function(os.environ["GATE_VERSION"], Path(os.environ["GATE_FOLDER"]))
    json.dump(_as_output(result), sys.stdout)


def _as_output(result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, bool):
        return {"verdict": "passed" if result else "failed"}
    raise TypeError(f"the function returned {type(result).__name__}, expected a bool or a dictionary")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as error:  # noqa: BLE001 - the operator's function may raise anything; code 1 means failed
        print(f"{sys.argv[1]}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
