"""What a model did with each held-out example: kept with a version, so that later answers can be compared one by one.

One line of JSON for each example, in the order of the held-out file; fewer lines than that file has where only its
first examples were asked. Knows nothing of where the file lies and of how it is protected.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from svc.files.json_file import read_records


class ExampleResult(BaseModel):
    """The answer to one example, and how good it is.

    Attributes:
        answer: greedy.
        tokens: of the answer, the one that ended it among them.
        limit: tokens that the answer could have.
        finish_reason: the engine's.
        logprob: mean natural-log probability of the answer's tokens; None for an empty answer.
        nll: negative log-likelihood of the reference answer, nats a token.
        scored: tokens that `nll` is the mean of; 1 where nothing was scored.
        hit: the answer is the reference, but for white space around.
        scores: what each metric that scores examples gives this one, by its name.
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
        """Whether the answer ended at its limit, not by itself."""
        return self.finish_reason == "length"


def largest_limit(results: Sequence[ExampleResult]) -> int:
    """Return the largest limit of the answers, tokens; there must be at least one answer."""
    return max(result.limit for result in results)


def token_weights(results: Sequence[ExampleResult]) -> list[float]:
    """Return how many tokens are behind each log-likelihood."""
    return [float(result.scored) for result in results]


def write_results(path: Path, results: Sequence[ExampleResult]) -> None:
    """Writes one line for each result, in their order."""
    path.write_text("".join(f"{result.model_dump_json()}\n" for result in results), "utf-8")


def read_results(path: Path) -> tuple[ExampleResult, ...]:
    """Reads them again.

    Raises:
        IntegrityError: there is no such file, or a line of it is no result.
    """
    return read_records(path, ExampleResult, "result of an example")
