"""Preference accuracy: the share of held-out pairs whose chosen answer is more likely than the rejected one.

Likelihoods are measured on the engine. Likelihood alone favors short answers. The implicit reward is therefore measured
too: how much more likely an answer is under the trained model than under its base (Rafailov et al. 2023, eq. 5, divided
by beta).
"""

import asyncio
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.client import EngineClient
from svc.evaluation.evaluator import CONCURRENCY, score
from svc.evaluation.intervals import Interval, mean, proportion

TokenizedPair = tuple[TokenizedExample, TokenizedExample]
"""The chosen and the rejected answer of a pair, each preceded by the prompt."""

PREFERENCE_TITLES = {
    "preference_accuracy": "chosen answer is more likely",
    "preference_margin": "by, in nats",
    "reward_accuracy": "chosen answer gained more",
    "reward_margin": "by, in nats",
}
"""Names of the metrics in a `PreferenceReport`, with their titles for display."""


class PairScores(BaseModel):
    """A model's log-probabilities for the chosen and the rejected answer of each pair, in the order of the pairs.

    Each is the sum over the answer's tokens, in nats.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    chosen: tuple[float, ...]
    rejected: tuple[float, ...]

    @property
    def margins(self) -> list[float]:
        """Log-probability of each chosen answer minus that of its rejected answer, in nats."""
        return [chosen - rejected for chosen, rejected in zip(self.chosen, self.rejected, strict=True)]


class PreferenceReport(BaseModel):
    """Preference accuracy of a model on held-out pairs, with the margins between chosen and rejected answers.

    Attributes:
        pairs: number of pairs.
        accuracy: share of pairs whose chosen answer is more likely than the rejected one.
        margin: mean difference between the log-probabilities of the chosen and the rejected answer, in nats.
        reward_accuracy: share of pairs in which training made the chosen answer more likely by a larger factor than the
            rejected one. None for the base itself, or if the base was not measured.
        reward_margin: mean difference between the log-probability gains of the chosen and the rejected answer in
            training, in nats.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: int
    accuracy: Interval
    margin: Interval
    reward_accuracy: Interval | None = None
    reward_margin: Interval | None = None

    @classmethod
    def of(cls, scores: PairScores, base: PairScores | None = None) -> "PreferenceReport":
        """Return the report on a model's scores for one or more pairs.

        Args:
            base: the base's scores for the same pairs, or None if the base was not measured.
        """
        margins = scores.margins
        report = cls(pairs=len(margins), accuracy=_share_above_zero(margins), margin=mean(margins))
        if base is None:
            return report
        gains = [after - before for after, before in zip(margins, base.margins, strict=True)]
        return report.model_copy(update={"reward_accuracy": _share_above_zero(gains), "reward_margin": mean(gains)})

    @property
    def figures(self) -> dict[str, Interval]:
        """The metrics that were measured, keyed by name."""
        figures = (self.accuracy, self.margin, self.reward_accuracy, self.reward_margin)
        return {name: figure for name, figure in zip(PREFERENCE_TITLES, figures, strict=True) if figure}


async def score_pairs(
    client: EngineClient, pairs: Sequence[TokenizedPair], *, on_done: Callable[[], None] = lambda: None
) -> PairScores:
    """Return the engine's scores for both answers of each pair.

    Args:
        on_done: called after each pair.

    Raises:
        EngineError: the engine rejected a request, or returned a log-probability that is not finite.
    """
    places = asyncio.Semaphore(CONCURRENCY)

    async def score_pair(pair: TokenizedPair) -> list[float]:
        async with places:
            summed = [await score(client, answer) * answer.scored for answer in pair]
            on_done()
            return summed

    scored = await asyncio.gather(*map(score_pair, pairs))
    return PairScores(chosen=tuple(pair[0] for pair in scored), rejected=tuple(pair[1] for pair in scored))


def _share_above_zero(differences: Sequence[float]) -> Interval:
    return proportion(sum(difference > 0 for difference in differences), len(differences))
