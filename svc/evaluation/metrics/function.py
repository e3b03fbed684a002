"""A Python function of the user's, as a metric: it runs in a process of its own, with a time limit.

Its file is the user's, and so is what it imports. Whatever it does to its process, this one is not harmed.
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

_SPEC = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)")


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """Where a function is.

    Attributes:
        path: of its file.
        function: its name there.
    """

    path: Path
    function: str

    @classmethod
    def parse(cls, text: str) -> "FunctionSpec | None":
        """Reads `FILE.py:FUNCTION`; None for what is not meant so."""
        found = _SPEC.fullmatch(text)
        return found and cls(Path(found["path"]), found["function"])

    @property
    def name(self) -> str:
        """The metric's: of the file and the function, once where they are the same."""
        words = dict.fromkeys((self.path.stem.lower(), self.function.lower()))
        return re.sub(r"[^a-z0-9_]", "_", "_".join(words))

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"


class FunctionMetric(Metric):
    """The mean of what a function gives each example; higher is better.

    The function is called once, as `function(answers, references)`, or `function(answers, references, prompts)` where
    it takes three: lists of text, prompts as lists of OpenAI messages. It returns one number for each answer.

    Args:
        seconds: that one call may take.
        name: of the metric; None: as the function's place says.
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
        said = self._call(json.dumps(texts).encode())
        if "error" in said:
            raise RecipeError(
                f"the metric {self.spec} failed:\n{said['error']}",
                expected="a list of one finite number for each answer",
                todo="fix the function",
            )
        return list(said["scores"])

    def _call(self, given: bytes) -> dict[str, Any]:
        """Return what the worker writes.

        Raises:
            RecipeError: it took too long, or its process ended.
        """
        if not self.spec.path.is_file():
            raise RecipeError(f"the metric {self.spec}: there is no such file", todo="correct evaluate.metrics")
        arguments = [function_worker.__file__, str(self.spec.path), self.spec.function, str(math.ceil(self._seconds))]
        # -B: Python takes the bytecode that it left for the file as it is now, where both are of the same second.
        command = [sys.executable, "-B", *arguments]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            try:
                said, _ = process.communicate(given, timeout=self._seconds)
            except subprocess.TimeoutExpired as error:
                raise RecipeError(
                    f"the metric {self.spec} was not done after {self._seconds:g} s",
                    todo="make it faster, raise evaluate.metric_seconds, or judge fewer examples: evaluate.limit",
                ) from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all that it started
        try:
            return dict(json.loads(said))
        except ValueError as error:
            raise RecipeError(
                f"the metric {self.spec} ended its process, exit code {process.returncode}",
                todo="see what it printed above; it must return its scores",
            ) from error
