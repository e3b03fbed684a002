"""Computes token limits for answers to held-out examples.

With a fixed limit, no answer can match a reference that is longer than the limit. Without a fixed limit, each answer's
limit is derived from its reference. This module works on token ids and texts; it knows nothing about tokenizers or
engines.
"""

import math
from collections.abc import Sequence

from svc.dataset.schema.tokenized_example import TokenizedExample

REFERENCE_FACTOR = 1.5
"""Token limit of an answer, as a multiple of its reference's length, before `SPARE_TOKENS` are added. A correct answer
in different words may be 1.5 times as long as the reference."""
SPARE_TOKENS = 16
"""Tokens added to each answer's limit. For a short reference, such as a label of a few tokens, `REFERENCE_FACTOR` alone
would leave too little room for different wording. Also, with some templates the model ends an answer with more than one
token."""


def answer_limits(examples: Sequence[TokenizedExample], *, context: int, fixed: int | None) -> tuple[int, ...]:
    """Return the token limit for the answer to each example.

    Args:
        context: maximum total number of tokens in a prompt and its answer. vLLM rejects a request if its
            prompt and its limit add up to more.
        fixed: the recipe's `evaluate.max_tokens`, which applies to all examples, or None to derive each
            limit from the reference.
    """
    return tuple(_limit_of(example, context) if fixed is None else fixed for example in examples)


def limit_of_text(reference: str) -> int:
    """Return the token limit for the answer of a model whose tokenizer is unknown.

    The limit is based on the number of bytes in the reference, because no text has more tokens than UTF-8 bytes.
    """
    return _limit_of_tokens(len(reference.encode()))


def _limit_of(example: TokenizedExample, context: int) -> int:
    return max(1, min(_limit_of_tokens(len(example.answer)), context - len(example.prompt)))


def _limit_of_tokens(tokens: int) -> int:
    return math.ceil(REFERENCE_FACTOR * tokens) + SPARE_TOKENS
