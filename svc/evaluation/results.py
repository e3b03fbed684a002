"""Per-example results on the held-out set. They are stored with a version so that later answers can be
compared with them one by one.

The file contains one JSON line per example, in the order of the held-out file. It is shorter than the
held-out file if only the first examples were evaluated.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from svc.files.json_file import read_records


class ExampleResult(BaseModel):
    """A model's answer to one example, and its scores.

    Attributes:
        answer: the model's answer, decoded greedily.
        tokens: number of tokens in the answer, including the token that ended it.
        limit: maximum number of tokens in the answer.
        finish_reason: the engine's `finish_reason`.
        logprob: mean natural-log probability of the answer's tokens, or None for an empty answer.
        nll: negative log-likelihood of the reference answer, in nats per token.
        scored: number of tokens over which `nll` is averaged; 1 if nothing was scored.
        hit: whether the answer equals the reference, ignoring surrounding white space.
        scores: scores from all metrics that score individual examples, keyed by metric name.
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
        """Whether the answer was cut off at its token limit."""
        return self.finish_reason == "length"


def largest_limit(results: Sequence[ExampleResult]) -> int:
    """Return the largest answer token limit among the results, which must not be empty."""
    return max(result.limit for result in results)


def token_weights(results: Sequence[ExampleResult]) -> list[float]:
    """Return each result's weight for averaging log-likelihoods, which is its number of scored tokens."""
    return [float(result.scored) for result in results]


def write_results(path: Path, results: Sequence[ExampleResult]) -> None:
    """Write the results to a file in order, one per line."""
    path.write_text("".join(f"{result.model_dump_json()}\n" for result in results), "utf-8")


def read_results(path: Path) -> tuple[ExampleResult, ...]:
    """Read results from a file.

    Raises:
        IntegrityError: the file is missing, or one of its lines is not a valid result.
    """
    return read_records(path, ExampleResult, "valid result of an example")
