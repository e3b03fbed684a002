"""Simulates trainings with curves drawn from a formula and a seed."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from svc.evaluation.results import ExampleResult
from tests.trainer.conftest import make_recipe
from trainer.evaluation.diagnosis.training_run import TrainingRun
from trainer.training_curve import TrainingPoint

RECIPE = make_recipe(train={"learning_rate": 5e-4, "epochs": 2.0})
Shape = Callable[[float], float]
"""Loss as a function of learning progress, the reached share of the run's summed learning rates."""


def falling(start: float, end: float, speed: float) -> Shape:
    """Return a loss that approaches its end value exponentially."""
    return lambda share: end + (start - end) * math.exp(-speed * share)


def simulate(
    shape: Shape,
    seed: int,
    *,
    steps: int = 100,
    noise: float = 0.15,
    heldout: Shape | None = None,
    measured: int = 64,
    spread: float = 0.6,
    **more: Any,
) -> TrainingRun:
    """Return a simulated run with a linear schedule.

    Args:
        noise: noise of a batch's loss, as a share of the loss.
        heldout: mean held-out loss over six measurements, or None to follow the training loss.
        spread: spread of the individual held-out losses, as a share; a tenth of it changes from one
            measurement to the next.
    """
    random = np.random.default_rng(seed)
    rates = [1 - step / steps for step in range(steps)]
    shares = np.cumsum(rates) / sum(rates)
    own = random.lognormal(-(spread**2) / 2, spread, measured)
    at = {round(place * steps / 5) for place in range(6)}
    epochs = more.get("recipe", RECIPE).train.epochs
    points = []
    for step in range(steps + 1):
        share = float(shares[step - 1]) if step else 0.0
        loss = shape(share) * float(random.lognormal(-(noise**2) / 2, noise))
        each: tuple[float, ...] = ()
        if step in at:
            moved = own * random.lognormal(-(spread**2) / 200, spread / 10, measured)
            each = tuple((heldout or shape)(share) * moved)
        points.append(
            TrainingPoint(
                step=step,
                epoch=epochs * step / steps,
                loss=loss if step else None,
                heldout_loss=float(np.mean(each)) if each else None,
                heldout_each=each,
                learning_rate=5e-4 * rates[step - 1] if step else None,
            )
        )
    run = TrainingRun(RECIPE, 5e-4, points, train_examples=1200)
    return replace(run, **more)


def answered(count: int, seed: int, *, right: Shape, noise: float = 0.0) -> tuple[ExampleResult, ...]:
    """Return the answers of a well-calibrated model.

    Args:
        right: probability of the right answer, from the easiest example (0) to the hardest (1).
        noise: share of references that are wrong.
    """
    random = np.random.default_rng(seed)
    results = []
    for place in range(count):
        sure = right(place / count)
        hit = random.random() < sure and random.random() >= noise
        results.append(
            ExampleResult(
                answer="a",
                tokens=1,
                limit=18,
                finish_reason="stop",
                logprob=math.log(sure * (1 - noise)),
                nll=0.1,
                scored=1,
                hit=bool(hit),
            )
        )
    return tuple(results)
