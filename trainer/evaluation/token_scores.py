"""Per-token scores of a given answer: each token's log-probability and the model's top-1 token.

The engine and the trainer's own model produce scores in the same form, so that the two can be compared
token by token.
"""

from collections.abc import Sequence
from typing import NamedTuple

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.client import EngineClient

_MAX_EXAMPLES = 32
_MAX_TOKENS = 2048
"""Maximum total number of tokens to score. A quantized 135M model scores this many tokens in 20 s on two cores with
AVX2."""


class TokenScore(NamedTuple):
    """Score of a single token, given all tokens before it.

    Attributes:
        logprob: the token's natural-log probability.
        top_token: id of the top-1 token at this position.
    """

    logprob: float
    top_token: int


Scores = tuple[tuple[TokenScore, ...], ...]
"""Scores of all trained-on tokens, grouped by example."""


def choose_examples(tokenized: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """Return examples spread over the held-out set: at most 2,048 tokens in total, but always at least one example."""
    stride = max(1, len(tokenized) // _MAX_EXAMPLES)
    chosen: list[TokenizedExample] = []
    tokens = 0
    for example in tokenized[::stride][:_MAX_EXAMPLES]:
        tokens += len(example.input_ids)
        if chosen and tokens > _MAX_TOKENS:
            break
        chosen.append(example)
    return chosen


async def score_on_engine(client: EngineClient, examples: Sequence[TokenizedExample]) -> Scores:
    """Return the engine's scores for the examples' answers. Examples are sent one at a time.

    Raises:
        EngineError: the engine rejected a request.
    """
    scores = []
    for example in examples:
        tokens = await client.top_tokens(example.input_ids, example.learnt[0][0])
        scores.append(tuple(example.of_learnt([TokenScore(*token) for token in tokens])))
    return tuple(scores)
