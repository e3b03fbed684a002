"""Durations of engine steps, either measured on an engine and stored as JSON, or estimated from a GPU's published
specifications.

In each step a vLLM engine computes the next token of every running answer, and part of the prompts of new requests.
"""

from bisect import bisect_left
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.sizing.model_size import ModelSize
from svc.engine.gpus import ListedGpu
from svc.errors import SettingsError
from svc.files.disk import write_whole

_STEP_TOKENS = 2048
_LARGE_STEP_TOKENS = 8192
_LARGE_MEMORY_GIB = 70
"""vLLM 0.32 schedules up to 8,192 tokens per step on GPUs with at least this much memory (except A100), and up to 2,048
on all other GPUs."""
_BANDWIDTH_SHARE = 0.7
_COMPUTE_SHARE = 0.5
"""Assumed shares of a GPU's published memory bandwidth and compute throughput that an engine reaches. Neither share was
measured."""
_MANY_GPUS_SHARE = 0.8
"""Assumed efficiency of several GPUs that share a model, given that they exchange results in each layer."""
_STEP_OVERHEAD_S = 0.0005
_ROOFLINE_OVERHEAD_S = 0.01

Seconds = Annotated[float, Field(gt=0, lt=3600)]


class Point(BaseModel):
    """A measured time.

    Attributes:
        count: number of running answers in a decoding step, or of tokens in a prompt.
        seconds: median duration of the step, or time to first token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(ge=1)
    seconds: Seconds


class MeasuredTimes(BaseModel):
    """Times that `svc plan --measure` measured on an engine. The file's format is described in docs/scale.md.

    Attributes:
        model: name of the model, and where it was served.
        prompt, answer: lengths of each measured request's prompt and answer, in tokens. Step times may
            differ for requests of other lengths.
        decoding: time of an engine step that processes no prompts, by number of answers being generated.
        prefill: time to first token of an uncached prompt on an idle engine, by number of prompt tokens.
        step_tokens: maximum number of tokens in one engine step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: str
    measured_at: AwareDatetime
    prompt: int = Field(ge=1)
    answer: int = Field(ge=2)
    decoding: tuple[Point, ...] = Field(min_length=1)
    prefill: tuple[Point, ...] = Field(min_length=2)
    step_tokens: int = Field(_STEP_TOKENS, ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        for points in (self.decoding, self.prefill):
            if any(second.count <= first.count for first, second in pairwise(points)):
                raise ValueError("'count' must increase from point to point")
        return self

    @property
    def label(self) -> str:
        return f"measured: {self.model}, {datetime.date(self.measured_at)}"

    @property
    def prefill_token_s(self) -> float:
        """Seconds that each prompt token adds to a step: the slope between the shortest and the longest prompt."""
        short, long = self.prefill[0], self.prefill[-1]
        return max(0.0, (long.seconds - short.seconds) / (long.count - short.count))

    @property
    def overhead_s(self) -> float:
        """Seconds that a request spends outside the engine's steps, calculated from the measurement with the longest
        prompt.
        """
        longest = self.prefill[-1]
        return max(0.0, longest.seconds - self.step_s(0, longest.count, 0))

    def step_s(self, running: int, prompt_tokens: int, context: int) -> float:
        """Return the duration of a step. It is interpolated between measured points, and extrapolated beyond them.

        Args:
            running: number of running answers, each of which gets its next token.
            prompt_tokens: number of prompt tokens computed in the step.
            context: ignored, because the measured steps include their contexts.
        """
        return _interpolated(self.decoding, max(1, running)) + prompt_tokens * self.prefill_token_s

    def write(self, path: Path) -> None:
        write_whole(path, self.model_dump_json(indent=1).encode("utf-8"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a measurement file.

        Raises:
            SettingsError: the file cannot be read or is not valid.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise SettingsError(
                f"cannot read the measurement {path}: {error}",
                expected="a file written by `svc plan --measure`",
                todo="measure again: svc plan --measure NAME@N",
            ) from error


def _interpolated(points: tuple[Point, ...], count: int) -> float:
    """Return the time for a number of answers or tokens (`Point.count`), by linear interpolation or extrapolation."""
    if len(points) == 1:
        return points[0].seconds
    right = min(max(1, bisect_left([point.count for point in points], count)), len(points) - 1)
    low, high = points[right - 1], points[right]
    slope = (high.seconds - low.seconds) / (high.count - low.count)
    if count > high.count:
        slope = max(slope, 0.0)
    return max(1e-6, low.seconds + slope * (count - low.count))


@dataclass(frozen=True, slots=True)
class Roofline:
    """Step times estimated from published GPU specifications: a step takes as long as its memory reads or its
    computation, whichever takes longer.

    Attributes:
        gpus: number of GPUs per replica.
    """

    gpu: ListedGpu
    size: ModelSize
    gpus: int

    @property
    def label(self) -> str:
        return f"unmeasured: roofline of {self.gpus} x {self.gpu.label}"

    @property
    def overhead_s(self) -> float:
        """Assumed seconds that a request spends outside the engine's steps."""
        return _ROOFLINE_OVERHEAD_S

    @property
    def step_tokens(self) -> int:
        """Maximum number of tokens in one engine step."""
        large = self.gpu.memory_gib >= _LARGE_MEMORY_GIB and "A100" not in self.gpu.label
        return _LARGE_STEP_TOKENS if large else _STEP_TOKENS

    def step_s(self, running: int, prompt_tokens: int, context: int) -> float:
        """Return the duration of a step. See `MeasuredTimes.step_s`.

        Args:
            context: number of tokens in the KV cache that the running answers read.
        """
        tokens = running + prompt_tokens
        speed = self.gpus * (_MANY_GPUS_SHARE if self.gpus > 1 else 1.0)
        read = self.size.read_bytes(tokens) + context * self.size.token_bytes
        memory_s = read / (self.gpu.bandwidth * 1e9 * _BANDWIDTH_SHARE * speed)
        compute_s = 2 * self.size.active * tokens / (self.gpu.tflops * 1e12 * _COMPUTE_SHARE * speed)
        return max(memory_s, compute_s) + _STEP_OVERHEAD_S


StepTimes = MeasuredTimes | Roofline
