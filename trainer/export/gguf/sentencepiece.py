"""Splits texts into tokens as llama.cpp does with SentencePiece tokenizers, such as Llama 2's.

llama.cpp repeatedly joins the two adjacent pieces whose concatenation has the highest score, until no concatenation
is in the vocabulary. The tokenizers library applies merges in the order of a list. Both methods give the same tokens if
the scores follow the order of the list. The caller checks this on real texts. This module does not write files.
"""

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

SPACE = "\u2581"
"""Character that replaces spaces in the tokenizer's vocabulary."""


@dataclass(frozen=True)
class SentencePiece:
    """The SentencePiece tokenizer that llama.cpp uses in place of a base's own tokenizer.

    Attributes:
        content: contents of the base's tokenizer.json.
        prefix: whether a space is prepended to each text, including the text after a special token.
        name: name of the tokenizer in summaries. The GGUF file does not name a pre-tokenizer.
    """

    content: dict[str, Any] = field(repr=False)
    prefix: bool
    name: str = "sentencepiece"

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all pieces except added tokens."""
        vocabulary: dict[str, int] = self.content["model"]["vocab"]
        return vocabulary

    @cached_property
    def added(self) -> dict[str, int]:
        """Ids of special tokens and other added tokens."""
        return {token["content"]: token["id"] for token in self.content.get("added_tokens", [])}

    @cached_property
    def scores(self) -> dict[str, float]:
        """Score of each piece that a merge produces. The piece of the first merge has the highest score."""
        scores: dict[str, float] = {}
        for rank, merge in enumerate(self.content["model"]["merges"]):
            piece = "".join(merge.split(" ") if isinstance(merge, str) else merge)
            scores.setdefault(piece, -float(rank))
        return scores

    def score(self, piece: str) -> float:
        """Return the score of a piece. A piece that no merge produces, such as a single character, has the lowest
        score.
        """
        return self.scores.get(piece, -float(len(self.scores) + len(self.vocabulary)))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Special tokens in the text are recognized, but none are added around it."""
        if not self.added:
            return list(self._encode_plain(text))
        pattern = "|".join(re.escape(token) for token in sorted(self.added, key=len, reverse=True))
        ids: list[int] = []
        for part in re.split(f"({pattern})", text):
            if part in self.added:
                ids.append(self.added[part])
            elif part:
                ids.extend(self._encode_plain(part))
        return ids

    def _encode_plain(self, text: str) -> Iterator[int]:
        marked = ((" " if self.prefix else "") + text).replace(" ", SPACE)
        for piece in self._merge(marked):
            if (number := self.vocabulary.get(piece)) is not None:
                yield number
            else:
                yield from (self.vocabulary[f"<0x{byte:02X}>"] for byte in piece.encode("utf-8"))

    def _merge(self, text: str) -> Iterator[str]:
        """Split a text into characters, merge them into the pieces with the highest scores, and yield the pieces."""
        pieces: list[str] = list(text)
        after, before = [*range(1, len(pieces)), -1], [*range(-1, len(pieces) - 1)]
        waiting: list[tuple[float, int, str, str]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and pieces[left] + pieces[right] in self.vocabulary:
                score = self.score(pieces[left] + pieces[right])
                heapq.heappush(waiting, (-score, left, pieces[left], pieces[right]))

        for place in range(len(pieces) - 1):
            consider(place, place + 1)
        while waiting:
            _, left, first, second = heapq.heappop(waiting)
            right = after[left]
            if right < 0 or (pieces[left], pieces[right]) != (first, second):
                continue  # one of the two has been merged since
            pieces[left], pieces[right], after[left] = first + second, "", after[right]
            if after[left] >= 0:
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        yield from filter(None, pieces)
