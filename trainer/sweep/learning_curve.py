"""Held-out loss by the number of examples, and what twice as many would bring: a power law through measured points.

loss(n) = floor + scale * n^-exponent, as learning curves of neural networks mostly go (Hestness et al. 2017). Knows
nothing of training.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from svc.evaluation.estimate import Estimate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

SHARES = (0.1, 0.25, 0.5, 1.0)
_FEWEST_POINTS = 4
_EXPONENTS = np.linspace(0.05, 2.0, 79)
_RESAMPLES = 1000
_MISFIT = 0.15
"""Of the fall of the measured losses: a fit that misses one of them by more describes another curve."""
_WORTH = 0.02
"""Of the loss with all examples: a smaller gain is little."""


class Verdict(StrEnum):
    """What twice the data would bring."""

    WORTH = "worth it"
    LITTLE = "little"
    UNKNOWN = "cannot be told"


class Point(BaseModel):
    """A training on a part of the data.

    Attributes:
        loss: held-out, nats an answer token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int
    loss: Estimate
    steps: int
    seconds: float


class PowerLaw(BaseModel):
    """loss(n) = floor + scale * n^-exponent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    floor: float
    scale: float
    exponent: float

    def at(self, examples: float) -> float:
        """The loss that it foretells."""
        return float(self.floor + self.scale * examples**-self.exponent)


class LearningCurve(BaseModel):
    """What was measured, and what follows from it.

    Attributes:
        base: held-out loss before any training.
        law: None where the points do not fit one.
        doubled: loss that twice the examples would give.
        gain: by how much that is lower than with all of them.
        sentence: the same for a person.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: tuple[Point, ...]
    base: Estimate
    law: PowerLaw | None
    doubled: Estimate | None
    gain: Estimate | None
    verdict: Verdict
    sentence: str


def nested_subsets(labels: Sequence[Hashable], seed: int) -> list[tuple[int, ...]]:
    """Places of the examples of each share: each subset is in the next, and has each label as often as it can.

    Args:
        labels: of all examples; where each is another one, the subsets are plain random ones.
    """
    generator = np.random.default_rng(seed)
    groups = defaultdict(list)
    for place in generator.permutation(len(labels)).tolist():
        groups[labels[place]].append(place)
    # A label's examples stand at even distances between 0 and 1, from a random start: any beginning has its share.
    order = sorted(
        ((number + start) / len(places), place)
        for places, start in ((places, generator.random()) for places in groups.values())
        for number, place in enumerate(places)
    )
    placed = [place for _, place in order]
    sizes = sorted({round(share * len(labels)) for share in SHARES})
    return [tuple(sorted(placed[:size])) for size in sizes if size]


def fit(examples: "Floats", losses: "Floats") -> "Floats":
    """The power law of least squares with a floor and a scale that are not negative, for each row of losses.

    Args:
        examples: [points].
        losses: [rows, points].

    Returns:
        [rows, 3]: floor, scale, exponent.
    """
    best: Floats = np.full(len(losses), np.inf)
    found = np.zeros((len(losses), 3))
    mean = losses.mean(axis=1)
    for exponent in _EXPONENTS:
        x = examples**-exponent
        spread = x - x.mean()
        scale = np.maximum(losses @ spread / (spread @ spread), 0.0)
        floor = mean - scale * x.mean()
        through_zero = losses @ x / (x @ x)
        scale = np.where(floor < 0, through_zero, scale)
        floor = np.maximum(floor, 0.0)
        errors = ((losses - floor[:, None] - scale[:, None] * x) ** 2).sum(axis=1)
        better = errors < best
        best = np.where(better, errors, best)
        found[better] = np.stack([floor, scale, np.full_like(floor, exponent)], axis=1)[better]
    return found


def foretell(
    points: Sequence[Point], each: Sequence[Sequence[float]], tokens: Sequence[int], base: Estimate
) -> LearningCurve:
    """What follows from trainings on parts of the data.

    The interval is a bootstrap over the held-out examples, drawn alike for all points.

    Args:
        points: ascending.
        each: held-out loss of each example, for each point.
        tokens: of each held-out example.
    """
    sizes = np.array([point.examples for point in points], dtype=float)
    losses, weights = np.array(each, dtype=float), np.array(tokens, dtype=float)
    whole = losses @ weights / weights.sum()
    floor, scale, exponent = fit(sizes, whole[None])[0]
    law = PowerLaw(floor=floor, scale=scale, exponent=exponent)
    if why := _misfit(law, sizes, whole):
        sentence = f"What more data would bring cannot be told: {why}."
        return LearningCurve(
            points=tuple(points),
            base=base,
            law=None,
            doubled=None,
            gain=None,
            verdict=Verdict.UNKNOWN,
            sentence=sentence,
        )
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(len(weights), np.full(len(weights), 1 / len(weights)), _RESAMPLES) * weights
    laws = fit(sizes, drawn @ losses.T / drawn.sum(axis=1, keepdims=True))
    more, now = (_at(laws, size) for size in (2 * sizes[-1], sizes[-1]))
    doubled = _interval(law.at(2 * sizes[-1]), more)
    gain = _interval(law.at(sizes[-1]) - law.at(2 * sizes[-1]), now - more)
    verdict = _judge(gain, float(whole[-1]))
    sentence = (
        f"Twice the data would lower held-out loss by about {gain.value:.3f} (95 % {gain.low:.3f} to {gain.high:.3f}), "
        f"from {whole[-1]:.3f} to {doubled.value:.3f}: {verdict}."
    )
    return LearningCurve(
        points=tuple(points), base=base, law=law, doubled=doubled, gain=gain, verdict=verdict, sentence=sentence
    )


def _misfit(law: PowerLaw, sizes: "Floats", losses: "Floats") -> str | None:
    """Why the points say nothing of a larger number."""
    if len(sizes) < _FEWEST_POINTS:
        return f"there are {len(sizes)} points, and a fit needs {_FEWEST_POINTS}"
    fall = float(losses[0] - losses[-1])
    if fall <= 0 or law.scale == 0:
        return "held-out loss did not fall with more data"
    worst = max(range(len(sizes)), key=lambda place: abs(losses[place] - law.at(float(sizes[place]))))
    off = float(losses[worst] - law.at(float(sizes[worst])))
    if abs(off) > _MISFIT * fall:
        return f"the points lie on no power law; at {sizes[worst]:.0f} examples the best one is off by {off:+.3f}"
    return None


def _at(laws: "Floats", examples: float) -> "Floats":
    return np.asarray(laws[:, 0] + laws[:, 1] * examples ** -laws[:, 2])


def _interval(value: float, resampled: "Floats") -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def _judge(gain: Estimate, loss: float) -> Verdict:
    if gain.low >= _WORTH * loss:
        return Verdict.WORTH
    return Verdict.LITTLE if gain.high < _WORTH * loss else Verdict.UNKNOWN
