"""Which held-out examples a person should read: the worst answers, those that got worse, and some of all."""

from collections.abc import Iterable
from dataclasses import dataclass

from svc.dataset.schema.example import ChatExample
from svc.evaluation.metrics.metric import Better
from svc.report.judged import BASE, Judged, score_of

WORST = 10
SIDE_BY_SIDE = 20


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """What one model answered.

    Attributes:
        score: of the primary metric; None where that gives single answers none.
        nll: negative log-likelihood of the reference, nats a token.
        cut_off: the answer ended at its limit of tokens.
    """

    model: str
    text: str
    hit: bool
    score: float | None
    nll: float
    cut_off: bool


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One example with all answers.

    Attributes:
        number: its line in the held-out file.
    """

    number: int
    example: ChatExample
    answers: tuple[ShownAnswer, ...]


def worst_examples(judged: Judged, better: Better) -> tuple[ShownExample, ...]:
    """The lowest scores of the primary metric; of equal ones, those whose reference is least likely. No right answer.

    Args:
        better: of the primary metric.
    """
    results = judged.results.get(judged.tuned or "", ())
    wrong = [place for place, result in enumerate(results) if not result.hit]
    ordered = sorted(
        wrong, key=lambda place: (_goodness(judged, judged.tuned or "", better, place), -results[place].nll)
    )
    return _shown(judged, ordered[:WORST])


def lost_examples(judged: Judged, better: Better) -> tuple[ShownExample, ...]:
    """What the base answered better, by the primary metric: the largest losses."""
    tuned = judged.tuned
    if tuned is None or not {BASE, tuned} <= set(judged.results):
        return ()
    losses = {
        place: _goodness(judged, BASE, better, place) - _goodness(judged, tuned, better, place)
        for place in range(min(len(judged.results[BASE]), len(judged.results[tuned])))
    }
    lost = sorted((place for place, loss in losses.items() if loss > 0), key=lambda place: (-losses[place], place))
    return _shown(judged, lost[:WORST])


def side_by_side(judged: Judged) -> tuple[ShownExample, ...]:
    """Twenty of all, evenly spread over the held-out file: chosen by no answer."""
    count = len(judged.results.get(judged.tuned or "", ()))
    chosen = min(count, SIDE_BY_SIDE)
    return _shown(judged, [place * count // chosen for place in range(chosen)])


def _goodness(judged: Judged, model: str, better: Better, place: int) -> float:
    """The higher the better: by the primary metric or, where it gives single answers no score, by a hit."""
    result = judged.results[model][place]
    score = score_of(result, judged.primary)
    if score is None:
        return float(result.hit)
    return -score if better is Better.LOWER else score


def _shown(judged: Judged, places: Iterable[int]) -> tuple[ShownExample, ...]:
    return tuple(
        ShownExample(
            place + 1,
            judged.examples[place],
            tuple(
                ShownAnswer(model, one.answer, one.hit, score_of(one, judged.primary), one.nll, one.cut_off)
                for model, results in judged.results.items()
                if place < len(results) and (one := results[place])
            ),
        )
        for place in places
    )
