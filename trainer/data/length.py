"""What becomes of examples that are longer than a row may be, and whether what is left can be served.

Knows token ids alone.
"""

from collections.abc import Sequence
from dataclasses import replace

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import DataError
from svc.terminal import console
from trainer.recipe.sections import TooLong, Train


def fit_length(rows: Sequence[TokenizedExample], train: Train) -> list[TokenizedExample]:
    """The examples that are trained on, each of at most `train.max_length` tokens; says how many were not.

    Raises:
        DataError: examples are too long, and that is an error; or fewer than two are left.
    """
    longer = [number for number, row in enumerate(rows, start=1) if len(row.input_ids) > train.max_length]
    if not longer:
        return list(rows)
    longest = max(rows, key=lambda row: len(row.input_ids))
    if train.too_long is TooLong.ERROR:
        raise DataError(
            f"{len(longer)} of {len(rows)} examples are longer than {train.max_length} tokens; "
            f"the longest, number {rows.index(longest) + 1}, has {len(longest.input_ids)}",
            expected="whole examples",
            todo=f"set train.max_length to {len(longest.input_ids)} or more, or shorten those examples; or set "
            "train.too_long to drop or truncate",
        )
    if train.too_long is TooLong.TRUNCATE:
        kept = [cut for row in rows if (cut := _cut(row, train.max_length))]
    else:
        kept = [row for row in rows if len(row.input_ids) <= train.max_length]
    dropped = len(rows) - len(kept)
    console.print(
        f"  [yellow]{len(longer)} of {len(rows)} examples are longer than {train.max_length} tokens, the first is "
        f"number {longer[0]}: {dropped} were left out, {len(longer) - dropped} cut[/yellow]"
    )
    if len(kept) < 2:
        raise DataError(
            f"{len(kept)} of {len(rows)} examples fit into {train.max_length} tokens",
            expected="at least 2",
            todo="raise train.max_length",
        )
    return kept


def _cut(row: TokenizedExample, length: int) -> TokenizedExample | None:
    """Its beginning; None where nothing of that is learnt."""
    learnt = tuple((start, min(end, length)) for start, end in row.learnt if start < length)
    return replace(row, input_ids=row.input_ids[:length], learnt=learnt) if learnt else None


def check_served_length(rows: Sequence[TokenizedExample], longest: int, what: str, *, room: int = 0) -> None:
    """Raises where an example would not fit into the engine.

    Args:
        longest: tokens of a prompt with its answer that the engine takes.
        what: the examples are, as `held-out`.
        room: tokens for an answer after the prompt, if that is more than the example's own.

    Raises:
        DataError: names the longest.
    """
    # To score an answer, vLLM is sent prompt and answer as a prompt, which must leave room for one more token.
    sizes = [max(len(row.input_ids) + 1, len(row.prompt) + room) for row in rows]
    if sizes and (needed := max(sizes)) > longest:
        raise DataError(
            f"{sum(size > longest for size in sizes)} of {len(rows)} {what} examples need more than {longest} tokens; "
            f"the longest, number {sizes.index(needed) + 1}, needs {needed} with its answer",
            expected="examples that the engine can be asked, as clients will ask it",
            todo=f"set engine.max_model_len to {needed} or more where the model takes so many, or shorten them",
        )
