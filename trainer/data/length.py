"""Handling of examples that are longer than `train.max_length`, and the check that examples can be served.

Knows only token ids.
"""

from collections.abc import Sequence
from dataclasses import replace

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import DataError
from svc.terminal import console
from trainer.recipe.sections import TooLong, Train


def fit_length(rows: Sequence[TokenizedExample], train: Train) -> list[TokenizedExample]:
    """Return the training examples, with longer ones dropped or truncated to `train.max_length`; print their number.

    Raises:
        DataError: examples are too long and `train.too_long` is error, or fewer than two are left.
    """
    longer = [number for number, row in enumerate(rows, start=1) if len(row.input_ids) > train.max_length]
    if not longer:
        return list(rows)
    longest = max(rows, key=lambda row: len(row.input_ids))
    if train.too_long is TooLong.ERROR:
        raise DataError(
            f"{len(longer)} of {len(rows)} examples are longer than {train.max_length} tokens; "
            f"the longest, number {rows.index(longest) + 1}, has {len(longest.input_ids)}",
            expected="examples that fit completely",
            todo=f"set train.max_length to {len(longest.input_ids)} or more, shorten those examples, or set "
            "train.too_long to drop or truncate",
        )
    if train.too_long is TooLong.TRUNCATE:
        fitting = [truncated for row in rows if (truncated := _truncate(row, train.max_length))]
    else:
        fitting = [row for row in rows if len(row.input_ids) <= train.max_length]
    dropped = len(rows) - len(fitting)
    console.print(
        f"  [yellow]{len(longer)} of {len(rows)} examples are longer than {train.max_length} tokens; the first is "
        f"number {longer[0]}: {dropped} dropped, {len(longer) - dropped} truncated[/yellow]"
    )
    if len(fitting) < 2:
        raise DataError(
            f"{len(fitting)} of {len(rows)} examples fit into {train.max_length} tokens",
            expected="at least 2",
            todo="raise train.max_length",
        )
    return fitting


def _truncate(row: TokenizedExample, length: int) -> TokenizedExample | None:
    """Return the example truncated to a length; None if no answer is left."""
    learnt = tuple((start, min(end, length)) for start, end in row.learnt if start < length)
    return replace(row, input_ids=row.input_ids[:length], learnt=learnt) if learnt else None


def check_served_length(rows: Sequence[TokenizedExample], longest: int, what: str, *, room: int = 0) -> None:
    """Raise if an example does not fit into the engine.

    Args:
        longest: maximum number of tokens of a prompt with its answer in the engine.
        what: kind of examples, for the error, such as `held-out`.
        room: number of tokens to allow for an answer, if more than the example's own answer has.

    Raises:
        DataError: names the longest example.
    """
    # To score an answer, vLLM gets prompt and answer as a prompt, after which one more token must fit.
    sizes = [max(len(row.input_ids) + 1, len(row.prompt) + room) for row in rows]
    if sizes and (needed := max(sizes)) > longest:
        raise DataError(
            f"{sum(size > longest for size in sizes)} of {len(rows)} {what} examples need more than {longest} tokens; "
            f"the longest, number {sizes.index(needed) + 1}, needs {needed} with its answer",
            expected="examples that fit into a request to the engine",
            todo=f"set engine.max_model_len to {needed} or more if the model supports it, or shorten the examples",
        )
