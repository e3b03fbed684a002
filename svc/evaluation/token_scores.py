"""What a model finds of each token of an answer that is put before it: how likely that is, and what would be likeliest.

The same from whatever gives it, the engine or the trainer's own model, so that two can be compared token by token.
"""

from collections.abc import Sequence
from typing import NamedTuple

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.client import EngineClient

_MOST_EXAMPLES = 32
_MOST_TOKENS = 2048
"""Of all examples together: a quantized model of 135 million weights reads them in 20 s on two cores with AVX2."""


class TokenScore(NamedTuple):
    """Of one token, given all before it.

    Attributes:
        logprob: its natural-log probability.
        likeliest: id of the token with the largest.
    """

    logprob: float
    likeliest: int


Scores = tuple[tuple[TokenScore, ...], ...]
"""Of each learnt token of each example."""


def choose_examples(tokenized: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """Examples over the whole held-out set, so many as have 2,048 tokens together; one at least."""
    stride = max(1, len(tokenized) // _MOST_EXAMPLES)
    chosen: list[TokenizedExample] = []
    tokens = 0
    for example in tokenized[::stride][:_MOST_EXAMPLES]:
        tokens += len(example.input_ids)
        if chosen and tokens > _MOST_TOKENS:
            break
        chosen.append(example)
    return chosen


async def score_on_engine(client: EngineClient, examples: Sequence[TokenizedExample]) -> Scores:
    """What the engine finds of the examples' answers, one example after the other.

    Raises:
        EngineError: the engine refused.
    """
    found = []
    for example in examples:
        scores = await client.likeliest(example.input_ids, example.learnt[0][0])
        found.append(tuple(example.of_learnt([TokenScore(*score) for score in scores])))
    return tuple(found)
