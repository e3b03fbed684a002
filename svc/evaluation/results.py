"""Results of each held-out example, stored with a version so that later answers can be compared one by one.

One line of JSON for each example, in the order of the held-out file; fewer lines than in that file if only its first
examples were evaluated.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from svc.files.json_file import read_records


class ExampleResult(BaseModel):
    """A model's answer to one example, and its scores.

    Attributes:
        answer: the greedy answer.
        tokens: number of tokens in the answer, including the one that ended it.
        limit: maximum number of tokens of the answer.
        finish_reason: the engine's `finish_reason`.
        logprob: mean natural-log probability of the answer's tokens; None for an empty answer.
        nll: negative log-likelihood of the reference answer, nats per token.
        scored: number of tokens over which `nll` is the mean; 1 if nothing was scored.
        hit: whether the answer equals the reference, ignoring surrounding white space.
        scores: this example's score by each metric that scores examples, by the metric's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    answer: str
    tokens: int = Field(ge=0)
    limit: int = Field(ge=1)
    finish_reason: str
    logprob: float | None
    nll: float
    scored: int = Field(ge=1)
    hit: bool
    scores: dict[str, float] = {}

    @property
    def cut_off(self) -> bool:
        """Whether the answer was cut off at its limit."""
        return self.finish_reason == "length"


def largest_limit(results: Sequence[ExampleResult]) -> int:
    """Return the largest limit on the answers, tokens; there must be at least one answer."""
    return max(result.limit for result in results)


def token_weights(results: Sequence[ExampleResult]) -> list[float]:
    """Return each result's number of scored tokens, as the weight of its log-likelihood."""
    return [float(result.scored) for result in results]


def write_results(path: Path, results: Sequence[ExampleResult]) -> None:
    """Write one line for each result, in order."""
    path.write_text("".join(f"{result.model_dump_json()}\n" for result in results), "utf-8")


def read_results(path: Path) -> tuple[ExampleResult, ...]:
    """Read results from a file.

    Raises:
        IntegrityError: the file is missing, or a line is not a result.
    """
    return read_records(path, ExampleResult, "result of an example")
