"""A tokenized chat example, which also marks the answers that are trained on and scored.

The trainer writes the token ids once. Training, evaluation and all later held-out evaluations read the same
ids, so that loss and log-likelihood refer to the same tokens. This module knows nothing about
tokenizers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from svc.errors import IntegrityError

Value = TypeVar("Value")
Place = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of a conversation, up to and including the token that ends its last answer.

    Attributes:
        learnt: token ranges of the answers that are trained on, each as (start, exclusive end). A range
            includes the token that ends the answer. There is at least one range, and they are in order.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    input_ids: tuple[Place, ...]
    learnt: Annotated[tuple[tuple[Place, Place], ...], Field(min_length=1)]

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens before the last answer that is trained on."""
        return self.input_ids[: self.learnt[-1][0]]

    @property
    def answer(self) -> tuple[int, ...]:
        """Tokens of the last answer that is trained on, including the token that ends it."""
        return self.input_ids[slice(*self.learnt[-1])]

    def of_learnt(self, values: Sequence[Value]) -> list[Value]:
        """Select the values of the tokens that are trained on.

        Args:
            values: one value per token, starting with the first token that is trained on.
        """
        first = self.learnt[0][0]
        return [value for start, end in self.learnt for value in values[start - first : end - first]]

    @property
    def scored(self) -> int:
        """Number of tokens that are trained on."""
        return sum(end - start for start, end in self.learnt)


_LINE = TypeAdapter(TokenizedExample)


def write_tokenized(path: Path, examples: Iterable[TokenizedExample]) -> None:
    """Write one line of JSON per example, in order."""
    path.write_bytes(b"".join(_LINE.dump_json(example) + b"\n" for example in examples))


def read_tokenized(path: Path) -> tuple[TokenizedExample, ...]:
    """Read the examples that `write_tokenized` wrote.

    Raises:
        IntegrityError: the file is missing, or one of its lines is not a valid example.
    """
    try:
        return tuple(_LINE.validate_json(line) for line in path.read_bytes().splitlines())
    except (OSError, ValidationError) as error:
        raise IntegrityError(
            f"cannot read {path}: {error}", todo="restore the file from a backup, or train again"
        ) from error
