"""Token limits for answers to held-out examples.

A fixed limit applies to every answer, so that no answer can match a longer reference. Without a fixed
limit, each example's reference determines the limit. This module knows token ids and texts, but no
tokenizer and no engine.
"""

import math
from collections.abc import Sequence

from svc.dataset.schema.tokenized_example import TokenizedExample

REFERENCE_FACTOR = 1.5
"""Multiplier for the reference's tokens, because a right answer in other words may be half again as long."""
SPARE_TOKENS = 16
"""Tokens added for short references. Half of a label's few tokens would leave too little room for different
wording, and with some templates the model ends an answer with more than one token."""


def answer_limits(examples: Sequence[TokenizedExample], *, context: int, fixed: int | None) -> tuple[int, ...]:
    """Return the limit on each example's answer, in tokens.

    Args:
        context: maximum number of tokens in a prompt and its answer together; vLLM rejects a request whose
            prompt and limit exceed it.
        fixed: the recipe's `evaluate.max_tokens`, which applies to every example, or None to derive each
            limit from the reference.
    """
    return tuple(_limit_of(example, context) if fixed is None else fixed for example in examples)


def limit_of_text(reference: str) -> int:
    """Return the limit on an answer, in tokens, for a model whose tokenizer is unknown.

    A tokenizer makes at most one token of each UTF-8 byte, so the number of bytes is an upper bound.
    """
    return _limit_of_tokens(len(reference.encode()))


def _limit_of(example: TokenizedExample, context: int) -> int:
    return max(1, min(_limit_of_tokens(len(example.answer)), context - len(example.prompt)))


def _limit_of_tokens(tokens: int) -> int:
    return math.ceil(REFERENCE_FACTOR * tokens) + SPARE_TOKENS
