"""Limits on the length of answers to held-out examples, in tokens.

A fixed limit applies to every answer, so that no answer can match a longer reference. Without a fixed limit,
each example's reference determines the limit. Knows token ids and texts, no tokenizer and no engine.
"""

import math
from collections.abc import Sequence

from svc.dataset.schema.tokenized_example import TokenizedExample

REFERENCE_FACTOR = 1.5
"""Factor on the reference's tokens: a right answer in other words may be half again as long."""
SPARE_TOKENS = 16
"""Tokens added for short references: half of a label's few tokens is too little for another wording, and with some
templates the model ends an answer with more than one token."""


def answer_limits(examples: Sequence[TokenizedExample], *, context: int, fixed: int | None) -> tuple[int, ...]:
    """Return the limit on each example's answer, tokens.

    Args:
        context: maximum number of tokens in a prompt and its answer together. vLLM rejects a request whose prompt and
            limit exceed it.
        fixed: the recipe's `evaluate.max_tokens`, for every example; None: each reference determines the limit.
    """
    return tuple(_limit_of(example, context) if fixed is None else fixed for example in examples)


def limit_of_text(reference: str) -> int:
    """Return the limit on an answer by a model with an unknown tokenizer, tokens.

    A tokenizer makes at most one token of each UTF-8 byte: the number of bytes is an upper bound.
    """
    return _limit_of_tokens(len(reference.encode()))


def _limit_of(example: TokenizedExample, context: int) -> int:
    return max(1, min(_limit_of_tokens(len(example.answer)), context - len(example.prompt)))


def _limit_of_tokens(tokens: int) -> int:
    return math.ceil(REFERENCE_FACTOR * tokens) + SPARE_TOKENS
