"""Checks that a tokenizer's ids have rows in the model's embedding.

Published tokenizers may have more ids than the model has rows. For example, Gemma 3 1B's tokenizer has an extra id for
images. This is harmless unless such an id is used, which causes an index error in the middle of training, quantizing or
serving.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import BaseModelError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_tokenizer(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", stops: Collection[int], embedding_rows: int
) -> None:
    """Check that the model has embedding rows for all token ids that may occur in ordinary text, and for the special
    tokens that libraries add.

    Args:
        folder: folder of the model, named in the error message.
        stops: ids of the tokens that end an answer.
        embedding_rows: number of rows of the model's embedding.

    Raises:
        BaseModelError: no token ends an answer, or an id has no embedding row.
    """
    if not stops:
        raise BaseModelError(
            f"{folder} does not specify a token that ends an answer",
            expected="eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
            todo="set eos_token to the token that ends a turn in the chat template, or choose another base",
        )
    named = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")}
    for role, token in (named | {f"end-of-answer {stop}": stop for stop in stops}).items():
        if token is not None and token >= embedding_rows:
            raise BaseModelError(
                f"the {role} token {tokenizer.convert_ids_to_tokens(token)!r} of {folder} has id {token}, but the "
                f"model has {embedding_rows} embedding rows",
                expected=f"an id below {embedding_rows}",
                todo=f"replace this token with an existing one in {folder / 'tokenizer_config.json'} (the end token "
                "can also be the pad token), or use the tokenizer that came with these weights",
            )
    added = tokenizer.added_tokens_decoder
    ordinary = max((token for token in tokenizer.get_vocab().values() if token not in added), default=0)
    if ordinary >= embedding_rows:
        raise BaseModelError(
            f"the tokenizer in {folder} has ids up to {ordinary}, but the model has {embedding_rows} embedding rows",
            expected=f"ids below {embedding_rows}",
            todo="use the tokenizer that came with these weights",
        )


def checked_ids(
    examples: Iterable[Sequence[TokenizedExample]], embedding_rows: int, what: str
) -> Iterator[Sequence[TokenizedExample]]:
    """Yield the examples after checking that all their token ids have embedding rows. The ids of rare special tokens
    may have none.

    Args:
        examples: the rows of each example.
        what: kind of examples, for the error message, such as `training`.

    Raises:
        DataError: an id has no embedding row; the message names the first example with such an id.
    """
    for number, rows in enumerate(examples, start=1):
        if (largest := max(max(row.input_ids) for row in rows)) >= embedding_rows:
            raise DataError(
                f"{what} example {number} contains the token id {largest}, but the model has {embedding_rows} "
                "embedding rows",
                expected=f"ids below {embedding_rows}",
                todo="remove the special token from the example's text, or choose another base",
            )
        yield rows


def with_new_tokens(
    examples: Iterable[Sequence[TokenizedExample]], tokens: Mapping[int, str]
) -> Iterator[Sequence[TokenizedExample]]:
    """Yield the examples, and check at the end that each new token occurred in them. The embedding of an unused token
    could not be trained.

    Args:
        examples: the rows of each training example.
        tokens: texts of the new tokens, keyed by id.

    Raises:
        DataError: a new token does not occur in any example.
    """
    unused = dict(tokens)
    for rows in examples:
        if unused:
            for token in {token for row in rows for token in row.input_ids if token in unused}:
                del unused[token]
        yield rows
    if unused:
        raise DataError(
            f"the new token {next(iter(unused.values()))!r} does not occur in the training examples",
            expected="each token in new_tokens at least once in the training examples",
            todo="remove the token from new_tokens, or check its spelling in the examples",
        )
