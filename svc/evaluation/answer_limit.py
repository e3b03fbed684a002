"""Limits on the answers to held-out examples: maximum tokens of each answer.

A fixed limit gives every answer the same number of tokens, so that a longer reference cannot be matched. Without one,
the limit follows from the example's own reference. Knows token ids and texts, no tokenizer and no engine.
"""

import math
from collections.abc import Sequence

from svc.dataset.schema.tokenized_example import TokenizedExample

REFERENCE_FACTOR = 1.5
"""Times the reference's tokens: an answer may be half again as long and still be right in other words."""
SPARE_TOKENS = 16
"""For short references: half of a label's few tokens is too little for another wording, and with some chat templates
the model ends an answer with more than one token."""


def answer_limits(examples: Sequence[TokenizedExample], *, context: int, fixed: int | None) -> tuple[int, ...]:
    """Return the limit of each example's answer, tokens.

    Args:
        context: tokens of a prompt with its answer that the engine accepts. vLLM refuses a request whose prompt and
            limit together exceed it.
        fixed: the recipe's `evaluate.max_tokens`, which applies to every example; None: by each reference.
    """
    return tuple(_limit_of(example, context) if fixed is None else fixed for example in examples)


def limit_of_text(reference: str) -> int:
    """Return the limit of an answer whose model has an unknown tokenizer, tokens.

    A tokenizer makes at most one token of each UTF-8 byte: the number of bytes is an upper bound.
    """
    return _limit_of_tokens(len(reference.encode()))


def _limit_of(example: TokenizedExample, context: int) -> int:
    start, end = example.learnt[-1]
    length = len(example.input_ids)
    if end == length:
        tokens, available = length - start, context - start
    else:  # The last turn has weight 0: the start of its answer is not recorded, so both numbers are bounds.
        tokens, available = length - end, context - length + 1
    return max(1, min(_limit_of_tokens(tokens), available))


def _limit_of_tokens(tokens: int) -> int:
    return math.ceil(REFERENCE_FACTOR * tokens) + SPARE_TOKENS
