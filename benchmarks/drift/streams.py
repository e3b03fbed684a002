"""Builds prompt streams without a change, in which every alarm is false, and streams with a change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from benchmarks.drift.prompts import Places, Pool
from svc.drift_reference.sample import Floats

REFERENCE = 500
DAY, WEEK = 10_000, 21_000
"""Requests per day for the main traffic, and requests per week for a model with less traffic."""
CHANGE_AFTER = 600
"""Number of requests that precede the change."""


class Stream(NamedTuple):
    """An ordered stream of prompts.

    Attributes:
        conversations: conversation of each prompt, or None if each prompt has its own.
        clients: client of each prompt, or None if unknown.
    """

    prompts: Places
    conversations: Places | None = None
    clients: Sequence[str] | None = None


Make = Callable[[Pool, Places, Generator, int], Stream]
"""Stream builder called with the pool, prompt indexes like the reference's, a generator, and a length."""


def draw_reference(pool: Pool, seed: int) -> tuple[Places, Places, Generator]:
    """Return the indexes of a reference, those of the remaining prompts of the same kind, and the generator."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(pool.kinds["alike"])
    return order[:REFERENCE], order[REFERENCE:], generator


def independent(pool: Pool, live: Places, generator: Generator, count: int) -> Stream:
    """Return a stream of independent prompts."""
    return Stream(generator.choice(live, count))


def runs(length: int) -> Make:
    """Return a stream builder for client bursts: runs of `length` different prompts from one section."""

    def make(pool: Pool, live: Places, generator: Generator, count: int) -> Stream:
        sections, drawn = list(_by_section(pool, live).values()), list[Places]()
        while sum(map(len, drawn)) < count:
            section = sections[generator.integers(len(sections))]
            drawn.append(generator.choice(section, min(length, len(section)), replace=False))
        return Stream(np.concatenate(drawn)[:count])

    return make


def sessions(length: int, at_once: int) -> Make:
    """Return a stream builder for sessions of near copies, with `at_once` sessions running concurrently."""

    def make(pool: Pool, live: Places, generator: Generator, count: int) -> Stream:
        def begin() -> list[int]:
            prompt = int(generator.choice(live))
            return [prompt, *pool.rephrased[prompt][: length - 1]]

        return _interleave(begin, at_once, generator, count)

    return make


def conversations(length: int, at_once: int) -> Make:
    """Return a stream builder for conversations of different prompts from one section, `at_once` at a time."""

    def make(pool: Pool, live: Places, generator: Generator, count: int) -> Stream:
        sections = list(_by_section(pool, live).values())

        def begin() -> list[int]:
            section = sections[generator.integers(len(sections))]
            return list(generator.choice(section, min(length, len(section)), replace=False))

        return _interleave(begin, at_once, generator, count)

    return make


def batches(length: int, every: int) -> Make:
    """Return a stream builder for independent prompts of a hundred clients plus single-topic client batches."""

    def make(pool: Pool, live: Places, generator: Generator, count: int) -> Stream:
        prompts = generator.choice(live, count)
        clients = [f"client {number}" for number in generator.integers(0, 100, count)]
        sections = list(_by_section(pool, live).values())
        for first in range(every, count - length, every):
            section = sections[generator.integers(len(sections))]
            prompts[first : first + length] = generator.choice(section, length)
            clients[first : first + length] = ["batch"] * length
        return Stream(prompts, clients=clients)

    return make


def day_and_night(pool: Pool, live: Places, generator: Generator, count: int) -> Stream:
    """Return a stream in which half of the sections have a share of 0.3 to 0.7, depending on the time of day."""
    share = 0.5 + 0.2 * np.sin(2 * np.pi * np.arange(count) / DAY)
    return _of_two_halves(pool, live, generator, share)


def weekends(pool: Pool, live: Places, generator: Generator, count: int) -> Stream:
    """Return a stream in which half of the sections make up 0.34 of the prompts on five days and 0.9 on two."""
    weekend = np.arange(count) // (WEEK // 7) % 7 >= 5
    return _of_two_halves(pool, live, generator, np.where(weekend, 0.9, 0.34))


WITHOUT_CHANGE: dict[str, Make] = {
    "independent": independent,
    "runs of 5 of one topic": runs(5),
    "runs of 20 of one topic": runs(20),
    "bursts of 50 of one topic": runs(50),
    "sessions of 2 near copies": sessions(2, 1),
    "sessions of 5, 10 at once": sessions(5, 10),
    "sessions of 20": sessions(20, 1),
    "sessions of 20, 100 at once": sessions(20, 100),
    "conversations of 5, 20 at once": conversations(5, 20),
    "batches of 100 of one topic by one client": batches(100, 1_500),
    "day and night, ±0.2": day_and_night,
    "weekends, ±0.4": weekends,
}


@dataclass(frozen=True)
class Change:
    """A stream that changes after `CHANGE_AFTER` requests.

    Attributes:
        kind: kind of the changed prompts.
        count: number of requests after the change.
        share: share of changed prompts after the change.
        ramp: number of requests over which the share grows from 0 to 1 instead of changing immediately; 0 for no ramp.
        base: builder for the stream of unchanged prompts.
    """

    kind: str
    count: int
    share: float = 1.0
    ramp: int = 0
    base: Make = independent

    def make(self, pool: Pool, live: Places, generator: Generator) -> Stream:
        """Return a stream with `CHANGE_AFTER` requests before the change and `count` requests after it."""
        base = self.base(pool, live, generator, CHANGE_AFTER + self.count).prompts
        progress = np.arange(self.count)
        shares = np.minimum(1.0, progress / self.ramp) if self.ramp else np.full(self.count, self.share)
        changed = np.flatnonzero(generator.random(self.count) < shares)
        kind = pool.kinds[self.kind]
        rounds = [generator.permutation(kind) for _ in range(len(changed) // len(kind) + 1)]
        prompts = base.copy()
        prompts[CHANGE_AFTER + changed] = np.concatenate(rounds)[: len(changed)]
        return Stream(prompts)


WITH_CHANGE: dict[str, Change] = {
    "strong": Change("strong", 400),
    "medium": Change("medium", 400),
    "mild": Change("mild", 1_000),
    "20% strong": Change("strong", 1_500, share=0.2),
    "strong, growing over 5,000": Change("strong", 5_000, ramp=5_000),
    "strong, with day and night": Change("strong", 400, base=day_and_night),
    "mild, with day and night": Change("mild", 1_000, base=day_and_night),
    "mild, with weekends": Change("mild", 1_000, base=weekends),
    "20% strong, with runs of 5": Change("strong", 4_000, share=0.2, base=runs(5)),
    "templated client, 5%": Change("templated", 6_000, share=0.05),
    "2,100 fixed characters before each": Change("fixed", 400),
}


def _by_section(pool: Pool, places: Places) -> dict[str, Places]:
    sections: dict[str, list[int]] = {}
    for place in places:
        sections.setdefault(pool.sections[place], []).append(int(place))
    return {section: np.array(members, dtype=np.intp) for section, members in sorted(sections.items())}


def _of_two_halves(pool: Pool, live: Places, generator: Generator, share: Floats) -> Stream:
    sections = list(_by_section(pool, live).values())
    first, second = np.concatenate(sections[:6]), np.concatenate(sections[6:])
    count = len(share)
    drawn = np.where(generator.random(count) < share, generator.choice(first, count), generator.choice(second, count))
    return Stream(drawn)


def _interleave(begin: Callable[[], Sequence[int]], at_once: int, generator: Generator, count: int) -> Stream:
    active, begun = [(number, list(begin())) for number in range(at_once)], at_once
    prompts, numbers = np.zeros(count, dtype=np.intp), np.zeros(count, dtype=np.int64)
    for at in range(count):
        index = int(generator.integers(at_once))
        number, remaining = active[index]
        prompts[at], numbers[at] = remaining.pop(0), number
        if not remaining:
            active[index] = begun, list(begin())
            begun += 1
    return Stream(prompts, numbers)
