"""Handles examples longer than `train.max_length`, and checks examples against the engine's maximum length.

Works on token ids only.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import DataError
from svc.terminal import console
from trainer.recipe.train import TooLong, Train


def fit_length(examples: Sequence[Sequence[TokenizedExample]], train: Train) -> list[list[TokenizedExample]]:
    """Return the examples after dropping or truncating any that are longer than `train.max_length` (see
    `fitting_examples`).
    """
    return list(fitting_examples(examples, train))


def fitting_examples(examples: Iterable[Sequence[TokenizedExample]], train: Train) -> Iterator[list[TokenizedExample]]:
    """Yield training examples, dropping or truncating any that are longer than `train.max_length`. At the end, print
    how many were dropped and truncated.

    Args:
        examples: the rows of each example. The length of an example is the length of its longest row.

    Raises:
        DataError: at the end, if examples are too long and `train.too_long` is error, or fewer than two are left.
    """
    number, longer, first, fitting, longest, at = 0, 0, 0, 0, 0, 0
    for number, rows in enumerate(examples, start=1):
        length = max(len(row.input_ids) for row in rows)
        if length > longest:
            longest, at = length, number
        fits = length <= train.max_length
        if not fits:
            longer, first = longer + 1, first or number
        if fits or train.too_long is TooLong.TRUNCATE:
            kept = list(rows) if fits else [truncate(row, train.max_length) for row in rows]
            if answered := [row for row in kept if row.learnt]:
                fitting += 1
                yield answered
    if not longer:
        return
    if train.too_long is TooLong.ERROR:
        raise DataError(
            f"{longer} of {number} examples are longer than {train.max_length} tokens; "
            f"the longest, example {at}, has {longest} tokens",
            expected=f"examples of at most {train.max_length} tokens",
            todo=f"set train.max_length to at least {longest}, shorten those examples, or set "
            "train.too_long to `drop` or `truncate`",
        )
    dropped = number - fitting
    console.print(
        f"  [yellow]{longer} of {number} examples are longer than {train.max_length} tokens (first: "
        f"example {first}): {dropped} dropped, {longer - dropped} truncated[/yellow]"
    )
    if fitting < 2:
        raise DataError(
            f"only {fitting} of {number} examples fit into {train.max_length} tokens",
            expected="at least 2",
            todo="raise train.max_length",
        )


def cut_documents(documents: Iterable[Sequence[TokenizedExample]], length: int) -> Iterator[list[TokenizedExample]]:
    """Yield the rows of each document, after splitting documents that are longer than the given length.

    Each row begins with the document's first token. All remaining tokens of the document are trained on exactly once.
    """
    for rows in documents:
        first, *tokens = rows[0].input_ids
        parts = [tokens[start : start + length - 1] for start in range(0, len(tokens), length - 1)]
        yield [TokenizedExample((first, *part), ((1, 1 + len(part)),)) for part in parts]


def truncate(row: TokenizedExample, length: int) -> TokenizedExample:
    """Truncate a row to the given number of tokens. Answers that begin within this length are kept, but may be cut
    off.
    """
    learnt = tuple((start, min(end, length)) for start, end in row.learnt if start < length)
    return replace(row, input_ids=row.input_ids[:length], learnt=learnt)


def check_served_length(rows: Sequence[TokenizedExample], longest: int, what: str, *, room: int = 0) -> None:
    """Raise DataError if any example exceeds the engine's maximum length.

    Args:
        longest: maximum number of tokens that the engine allows for a prompt with its answer.
        what: kind of examples, for the error message, such as `held-out`.
        room: minimum number of tokens to reserve for an answer, even if the example's own answer is shorter.

    Raises:
        DataError: an example is too long; the message names the longest example.
    """
    check_served_sizes(np.array([max(len(row.input_ids), len(row.prompt) + room - 1) for row in rows]), longest, what)


def check_served_sizes(lengths: NDArray[np.integer], longest: int, what: str) -> None:
    """Raise DataError if any example exceeds the engine's maximum length.

    Args:
        lengths: number of tokens of each example.
        longest, what: see `check_served_length`.
    """
    # To score an answer, vLLM gets prompt and answer as a prompt, after which one more token must fit.
    if len(lengths) and (needed := int(lengths.max()) + 1) > longest:
        raise DataError(
            f"{int((lengths >= longest).sum())} of {len(lengths)} {what} examples need more than {longest} tokens; "
            f"the longest, example {int(lengths.argmax()) + 1}, needs {needed} including its answer",
            expected="examples that fit into one engine request",
            todo=f"set engine.max_model_len to at least {needed} if the model supports it, or shorten the examples",
        )
