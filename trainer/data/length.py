"""Handles examples longer than `train.max_length`, and checks that examples fit into the engine.

Works on token ids only.
"""

from collections.abc import Sequence
from dataclasses import replace

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import DataError
from svc.terminal import console
from trainer.recipe.train import TooLong, Train


def fit_length(examples: Sequence[Sequence[TokenizedExample]], train: Train) -> list[list[TokenizedExample]]:
    """Drop or truncate training examples longer than `train.max_length`, and print how many there were.

    Args:
        examples: the rows of each example. The length of an example is the length of its longest row.

    Raises:
        DataError: examples are too long and `train.too_long` is error, or fewer than two are left.
    """
    lengths = [max(len(row.input_ids) for row in rows) for rows in examples]
    longer = [number for number, length in enumerate(lengths, start=1) if length > train.max_length]
    if not longer:
        return list(map(list, examples))
    longest = max(lengths)
    if train.too_long is TooLong.ERROR:
        raise DataError(
            f"{len(longer)} of {len(examples)} examples are longer than {train.max_length} tokens; "
            f"the longest, example {lengths.index(longest) + 1}, has {longest} tokens",
            expected=f"examples of at most {train.max_length} tokens",
            todo=f"set train.max_length to at least {longest}, shorten those examples, or set "
            "train.too_long to drop or truncate",
        )
    if train.too_long is TooLong.TRUNCATE:
        truncated = ([truncate(row, train.max_length) for row in rows] for rows in examples)
        fitting = [answered for rows in truncated if (answered := [row for row in rows if row.learnt])]
    else:
        fitting = [list(rows) for rows, length in zip(examples, lengths, strict=True) if length <= train.max_length]
    dropped = len(examples) - len(fitting)
    console.print(
        f"  [yellow]{len(longer)} of {len(examples)} examples are longer than {train.max_length} tokens, the first "
        f"being example {longer[0]}: {dropped} dropped, {len(longer) - dropped} truncated[/yellow]"
    )
    if len(fitting) < 2:
        raise DataError(
            f"only {len(fitting)} of {len(examples)} examples fit into {train.max_length} tokens",
            expected="at least 2",
            todo="raise train.max_length",
        )
    return fitting


def truncate(row: TokenizedExample, length: int) -> TokenizedExample:
    """Truncate a row to the given length, keeping the answers that begin before it."""
    learnt = tuple((start, min(end, length)) for start, end in row.learnt if start < length)
    return replace(row, input_ids=row.input_ids[:length], learnt=learnt)


def check_served_length(rows: Sequence[TokenizedExample], longest: int, what: str, *, room: int = 0) -> None:
    """Raise DataError if any example does not fit into the engine.

    Args:
        longest: maximum number of tokens that the engine allows for a prompt with its answer.
        what: kind of examples, for the error message, such as `held-out`.
        room: minimum number of tokens to reserve for an answer, even if the example's own answer is shorter.

    Raises:
        DataError: names the longest example.
    """
    # To score an answer, vLLM gets prompt and answer as a prompt, after which one more token must fit.
    sizes = [max(len(row.input_ids) + 1, len(row.prompt) + room) for row in rows]
    if sizes and (needed := max(sizes)) > longest:
        raise DataError(
            f"{sum(size > longest for size in sizes)} of {len(rows)} {what} examples need more than {longest} tokens; "
            f"the longest, example {sizes.index(needed) + 1}, needs {needed} including its answer",
            expected="examples that fit into one engine request",
            todo=f"set engine.max_model_len to at least {needed} if the model supports it, or shorten the examples",
        )
