"""Wraps a user's Python function as a metric. The function runs in a separate process with a time limit.

The file and everything that it imports may be arbitrary code. If that code crashes its process, this process is not
affected.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svc.errors import RecipeError
from svc.evaluation.metrics import function_worker
from svc.evaluation.metrics.metric import Answered, Metric, Unit
from svc.settings.load import environment_without_store

_SPEC = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)")


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """Location of a user's metric function, given by a file and the name of a function in it.

    Attributes:
        path: the file that contains the function.
        function: name of the function in that file.
    """

    path: Path
    function: str

    @classmethod
    def parse(cls, text: str) -> "FunctionSpec | None":
        """Parse a location of the form `FILE.py:FUNCTION`. Return None if the text has a different form."""
        match = _SPEC.fullmatch(text)
        return match and cls(Path(match["path"]), match["function"])

    @property
    def name(self) -> str:
        """Name of the metric, which combines the names of the file and the function. If the two names are equal, the
        name appears once.
        """
        words = dict.fromkeys((self.path.stem.lower(), self.function.lower()))
        return re.sub(r"[^a-z0-9_]", "_", "_".join(words))

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"


class FunctionMetric(Metric):
    """Mean of the scores that a user's function gives to the answers. Higher is better.

    The function is called once for all examples, as `function(answers, references)` or, if it has three
    parameters, as `function(answers, references, prompts)`. Answers and references are lists of strings, and
    each prompt is a list of OpenAI messages. The function must return one number for each answer.

    Args:
        seconds: time limit for the call, in seconds.
        name: name of the metric, or None to derive it from the file and the function.
    """

    unit = Unit.NUMBER

    def __init__(self, spec: FunctionSpec, seconds: float, name: str | None = None) -> None:
        self.name = name or spec.name
        self.title = self.name
        self.spec = spec
        self._seconds = seconds

    def score(self, answered: Answered) -> list[float]:
        prompts = [[message.spoken() for message in example.prompt] for example in answered.examples]
        texts = {"answers": answered.answers, "references": answered.references, "prompts": prompts}
        output = self._call(json.dumps(texts).encode())
        if "error" in output:
            raise RecipeError(
                f"metric {self.spec} failed:\n{output['error']}",
                expected="a list with one finite number for each answer",
                todo="fix the function",
            )
        return list(output["scores"])

    def _call(self, given: bytes) -> dict[str, Any]:
        """Call the function in a worker process and return the worker's output.

        Raises:
            RecipeError: the file is missing, or the function took too long or terminated its process.
        """
        if not self.spec.path.is_file():
            raise RecipeError(f"the file of metric {self.spec} does not exist", todo="correct evaluate.metrics")
        arguments = [function_worker.__file__, str(self.spec.path), self.spec.function, str(math.ceil(self._seconds))]
        # -B: Python would use outdated bytecode if the file was changed within the same second.
        command = [sys.executable, "-B", *arguments]
        with subprocess.Popen(
            command,
            env=environment_without_store(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(given, timeout=self._seconds)
            except subprocess.TimeoutExpired as error:
                raise RecipeError(
                    f"metric {self.spec} did not finish within {self._seconds:g} s",
                    todo="speed up the function, raise evaluate.metric_seconds, or lower evaluate.limit",
                ) from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all its children
        try:
            return dict(json.loads(output))
        except ValueError as error:
            raise RecipeError(
                f"the process that ran metric {self.spec} exited with code {process.returncode}",
                todo="check the output above; the function must return scores and must not exit the process",
            ) from error
