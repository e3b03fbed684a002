"""The week's clients. The requests of each minute depend only on the seed, not on the server."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

import numpy as np

from benchmarks.week.timetable import (
    AWAKE_S,
    DAY_S,
    DAYS,
    HEAVY_TIMES,
    MAIN,
    MINUTE_S,
    NIGHT_RATE,
    SHIFT_AT,
    SIDE,
    WAKES,
    at,
    is_day,
    is_weekend,
)
from serving.protocols.error_code import ErrorCode

FOLDER = Path(__file__).parent
STREAMS = FOLDER.parent / "drift"
TOKENS = 7
"""Number of tokens in each answer, as in the registered answers."""
INDEPENDENT_PER_DAY, SESSIONS_PER_DAY, SIDE_PER_DAY = 2_500, 440, 1_000
HEAVY_REQUESTS, HEAVY_S = 120, 600
HEAVY_LIMIT = 10
"""Requests per minute allowed for the heavy client's key."""
SHIFTED_SHARE = 0.2
ENGINE_ERRORS, CLIENTS_GONE, CLIENTS_SLOW = 0.0005, 0.005, 0.001
"""Shares of requests that fail because of an engine error, a disconnected client or a slow client."""
_WEIGHT_PER_DAY = 14 * 60 + 10 * 60 * NIGHT_RATE
"""Minutes in a day, with night minutes weighted by their request rate."""
_FIRST_SHARE = {"day": 0.5, "night": 0.7, "weekend": 0.9}
"""Share of prompts from the first half of the sections, in alphabetical order."""
_RIGHT, _WRONG = 0.75, "libs"
"""Share of correct answers, and the section named in all wrong ones, as in the registered answers."""
_PER_WAKE = 25


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that arrives at the server.

    Attributes:
        at: time of arrival in seconds since the week's beginning.
        answer: the model's answer if the request completes.
        reason: why the request fails, or None if it completes.
        seconds: time from the start in the engine to the end of the answer.
        first_token: seconds to the first token, or None if the answer is not streamed.
        gaps: seconds between the tokens; empty if the answer is not streamed.
    """

    at: float
    model: str
    key_id: str
    prompt: str
    answer: str
    reason: ErrorCode | None
    seconds: float
    first_token: float | None
    gaps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompt texts that clients send.

    Attributes:
        by_section: prompts like those the versions were trained on, by section.
        shifted: prompts of a new kind.
        words: words from the prompts in `by_section`, for rephrasing.
    """

    by_section: dict[str, tuple[str, ...]]
    shifted: tuple[str, ...]
    words: tuple[str, ...]


@cache
def read_prompts() -> Prompts:
    """Read the prompts from benchmarks/drift."""
    usual = [json.loads(line) for line in (STREAMS / "in_distribution.jsonl").read_text("utf-8").splitlines()]
    texts = [row["prompt"] for row in usual]
    by_section = {
        name: tuple(row["prompt"] for row in usual if row["section"] == name)
        for name in sorted({row["section"] for row in usual})
    }
    rows = [json.loads(line) for line in (STREAMS / "shifted.jsonl").read_text("utf-8").splitlines()]
    shifted = tuple(row["prompt"] for row in rows if row["grade"] == "strong")
    return Prompts(by_section, shifted, tuple(word for text in texts for word in re.findall(r"[^\W\d_]+", text)))


class Clients:
    """All clients of the week.

    Args:
        seed: seed for all random decisions.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._prompts = read_prompts()
        self._sections = tuple(self._prompts.by_section)
        self._coming: list[tuple[float, int, Arrival]] = []
        self._order = count()

    def minutes(self) -> Iterator[list[Arrival]]:
        """Yield the requests of each minute of the week, in order."""
        for minute in range(DAYS * DAY_S // MINUTE_S):
            self._send(minute * MINUTE_S)
            until, arrived = (minute + 1) * MINUTE_S, list[Arrival]()
            while self._coming and self._coming[0][0] < until:
                arrived.append(heappop(self._coming)[2])
            yield arrived

    def _send(self, now: float) -> None:
        """Schedule the requests, sessions, bursts and wake-ups that begin in this minute."""
        weight = (1.0 if is_day(now) else NIGHT_RATE) / _WEIGHT_PER_DAY
        for _ in range(self._random.poisson(INDEPENDENT_PER_DAY * weight)):
            self._ask(self._within(now, MINUTE_S), MAIN, "portal", *self.draw(now))
        for _ in range(self._random.poisson(SESSIONS_PER_DAY * weight)):
            self._session(now)
        for _ in range(self._random.poisson(SIDE_PER_DAY * weight)):
            self._ask(self._within(now, MINUTE_S), SIDE, "editor", *self.draw(now, may_shift=False))
        if now % DAY_S in [at(f"1 {time}") for time in HEAVY_TIMES] and not is_weekend(now):
            self._burst(now)
        for model, (starts_s, moments) in WAKES.items():
            if now in [at(moment) for moment in moments]:
                self._wake(now, model, starts_s)

    def _session(self, now: float) -> None:
        """Send a session of near copies of one prompt."""
        text, section = self.draw(now)
        begins = self._within(now, MINUTE_S)
        for _ in range(self._random.integers(2, 9)):
            self._ask(begins, MAIN, "portal", text, section)
            begins += self._random.uniform(20, 90)
            text = self._rephrased(text)

    def _burst(self, now: float) -> None:
        """Send a burst of prompts from one section. Requests beyond the key's limit are rejected."""
        section = self._sections[self._random.integers(len(self._sections))]
        texts = self._prompts.by_section[section]
        sent = dict[int, int]()
        for begins in sorted(self._within(now, HEAVY_S) for _ in range(HEAVY_REQUESTS)):
            minute = int(begins // MINUTE_S)
            sent[minute] = sent.get(minute, 0) + 1
            limited = ErrorCode.RATE_LIMIT_EXCEEDED if sent[minute] > HEAVY_LIMIT else None
            self._ask(begins, MAIN, "batch", self._one_of(texts), section, limited)

    def _wake(self, now: float, model: str, starts_s: float) -> None:
        """Send the requests that wake an idle model and the requests that follow."""
        times = [now + 1.0, *(self._within(now, starts_s) for _ in range(2))]
        times += [self._within(now + starts_s, AWAKE_S - starts_s) for _ in range(_PER_WAKE - len(times))]
        for begins in times:
            self._ask(begins, model, "office", *self.draw(now, may_shift=False))

    def draw(self, now: float, *, may_shift: bool = True) -> tuple[str, str]:
        """Return a prompt that suits this time of the week, and its section."""
        share = _FIRST_SHARE["weekend" if is_weekend(now) else "day" if is_day(now) else "night"]
        half = len(self._sections) // 2
        first = self._random.random() < share
        section = self._sections[self._random.integers(half) + (0 if first else half)]
        if may_shift and now >= SHIFT_AT and self._random.random() < SHIFTED_SHARE:
            text = self._one_of(self._prompts.shifted)
            return (self._rephrased(text) if self._random.random() < 0.5 else text), section
        return self._one_of(self._prompts.by_section[section]), section

    def _rephrased(self, text: str) -> str:
        """Return a near copy of a prompt, with 8 to 25% of the words replaced, dropped or moved."""
        words = text.split(" ")
        for _ in range(max(1, int(len(words) * self._random.uniform(0.08, 0.25)))):
            place, kind = self._random.integers(len(words)), self._random.random()
            if kind < 0.4:
                words[place] = self._one_of(self._prompts.words)
            elif kind < 0.7 and len(words) > 5:
                words.pop(place)
            else:
                other = self._random.integers(len(words))
                words[place], words[other] = words[other], words[place]
        return " ".join(words)

    def _ask(
        self, begins: float, model: str, key_id: str, text: str, section: str, reason: ErrorCode | None = None
    ) -> None:
        fate = self._random.random()
        if reason is None and fate < ENGINE_ERRORS:
            reason = ErrorCode.ENGINE_ERROR
        elif reason is None and fate < ENGINE_ERRORS + CLIENTS_GONE:
            reason = ErrorCode.CLIENT_GONE
        elif reason is None and fate < ENGINE_ERRORS + CLIENTS_GONE + CLIENTS_SLOW:
            reason = ErrorCode.CLIENT_SLOW
        answered = section if self._random.random() < _RIGHT else _WRONG
        first_token = float(self._random.lognormal(np.log(0.15), 0.5))
        gaps = self._random.lognormal(np.log(0.02), 0.4, TOKENS - 1)
        if self._random.random() < 0.005:  # next to a long prompt of another request
            gaps[0] += 0.6
        streamed = reason is None and self._random.random() < 0.5
        arrival = Arrival(
            at=begins,
            model=model,
            key_id=key_id,
            prompt=text,
            answer=json.dumps({"section": answered}, separators=(",", ":")),
            reason=reason,
            seconds=30.0 if reason is ErrorCode.CLIENT_SLOW else first_token + float(gaps.sum()),
            first_token=first_token if streamed else None,
            gaps=tuple(map(float, gaps)) if streamed else (),
        )
        heappush(self._coming, (begins, next(self._order), arrival))

    def _one_of(self, texts: Sequence[str]) -> str:
        return texts[int(self._random.integers(len(texts)))]

    def _within(self, begins: float, length_s: float) -> float:
        return begins + self._random.uniform(0, length_s)
