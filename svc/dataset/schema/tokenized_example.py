"""A chat example as token ids: what a model sees, and which of it are answers that are learnt and scored.

Written once, by the trainer: training, evaluation and every later run of the held-out set read the same ids, so that a
loss and a log-likelihood speak of the same tokens. Knows no tokenizer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from svc.errors import IntegrityError

Value = TypeVar("Value")
Place = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of a conversation, up to and with the token that ends its last answer.

    Attributes:
        learnt: start and end of each answer that is learnt, with the token that ends it; the end is exclusive. At least
            one, in their order.
    """

    input_ids: tuple[int, ...]
    learnt: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the last answer that is learnt."""
        return self.input_ids[: self.learnt[-1][0]]

    @property
    def answer(self) -> tuple[int, ...]:
        """The last answer that is learnt, with the token that ends it."""
        return self.input_ids[slice(*self.learnt[-1])]

    def of_learnt(self, values: Sequence[Value]) -> list[Value]:
        """Those that belong to tokens that are learnt.

        Args:
            values: one for each token from the first learnt one on.
        """
        first = self.learnt[0][0]
        return [value for start, end in self.learnt for value in values[start - first : end - first]]

    @property
    def scored(self) -> int:
        """How many tokens are learnt."""
        return sum(end - start for start, end in self.learnt)


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    input_ids: tuple[Place, ...]
    learnt: tuple[tuple[Place, Place], ...] = Field(min_length=1)


def write_tokenized(path: Path, examples: Iterable[TokenizedExample]) -> None:
    """Writes one line of JSON for each example, in their order."""
    lines = (_Line(input_ids=one.input_ids, learnt=one.learnt).model_dump_json() for one in examples)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def read_tokenized(path: Path) -> tuple[TokenizedExample, ...]:
    """Reads them again.

    Raises:
        IntegrityError: there is no such file, or a line of it is no example.
    """
    try:
        lines = [_Line.model_validate_json(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValidationError) as error:
        raise IntegrityError(f"cannot read {path}: {error}", todo="restore it from a backup, or train again") from error
    return tuple(TokenizedExample(line.input_ids, line.learnt) for line in lines)
