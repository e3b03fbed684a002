"""What a person can read off an answer: its length, its end, whether it is what the task wants.

How long an answer is, how it ends and how likely it is depend on how it was sampled, and held-out answers are greedy.
Of live ones, only those that were asked for with temperature 0 are compared in these three, and as if they had been
cut where held-out answers were; otherwise every client that likes a higher temperature would be drift. Each held-out
answer has its own limit, and a live prompt has no reference to derive one from: the largest of the limits applies.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from svc.drift_reference.sample import NO, NOT_THERE, YES, Sample
from svc.evaluation.metrics.json_answers import is_json

_ENDS = ("stop", "length")
_MOST_LABELS = 30
_FEWEST_OF_LABEL = 3
"""References a label, in the mean; fewer are texts, not labels."""
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)"
    r"|i (?:can(?:'t|not| not)|won't|will not) (?:help|assist|answer|provide|do|comply|fulfil)"
    r"|as an ai\b|against my (?:guidelines|programming))",
    re.IGNORECASE,
)
_REFUSAL_CHARS = 200
"""A refusal says so at once."""


class AnswerFeature(StrEnum):
    """Each is a line of the drift table."""

    TOKENS = "answer_tokens"
    """Length; greedy answers only."""
    LOGPROB = "answer_logprob"
    """Mean log-probability of its tokens, in tenths of a nat, since scoring again rounds otherwise by hundredths; only
    greedy answers that were scored."""
    FINISH_REASON = "finish_reason"
    """`stop` or `length`; greedy answers only."""
    EMPTY = "empty"
    REFUSAL = "refusal"
    """It begins as refusals in English do."""
    VALID_JSON = "valid_json"
    """Only where all held-out references are JSON; of answers that ended where held-out ones could."""
    LABEL = "label"
    """The answer, where the references are a few labels, else `other`; of the same answers."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is compared of an answer; None is what is not known.

    Attributes:
        greedy: it was sampled as held-out answers are; else its length, end and likelihood are not compared.
        logprob: mean over its tokens, nats.
    """

    text: str | None
    tokens: int | None
    finish_reason: str | None
    logprob: float | None
    greedy: bool


class AnswerSampler:
    """Makes samples of answers that can be compared with each other.

    Args:
        references: the right answers of the held-out set; they tell whether the task is JSON, or labels.
        cut: where live answers count as cut, tokens: the largest limit of the held-out ones.
    """

    def __init__(self, references: Sequence[str], cut: int) -> None:
        self.cut = cut
        self._wants_json = bool(references) and all(is_json(reference) for reference in references)
        labels = {reference.strip() for reference in references}
        few = len(labels) <= min(_MOST_LABELS, len(references) / _FEWEST_OF_LABEL)
        self._labels = labels if few else set()

    def sample(self, answers: Sequence[Answer]) -> Sample:
        """Features of answers."""
        numbers = {
            AnswerFeature.TOKENS: [self._tokens(answer) for answer in answers],
            AnswerFeature.LOGPROB: [self._logprob(answer) for answer in answers],
        }
        categories = {
            AnswerFeature.FINISH_REASON: [self._finish_reason(answer) for answer in answers],
            AnswerFeature.EMPTY: [self._empty(answer) for answer in answers],
            AnswerFeature.REFUSAL: [_yes(answer.text, is_refusal) for answer in answers],
        }
        if self._wants_json:
            categories[AnswerFeature.VALID_JSON] = [_yes(self._whole(answer), is_json) for answer in answers]
        if self._labels:
            categories[AnswerFeature.LABEL] = [self._label(self._whole(answer)) for answer in answers]
        return Sample(
            len(answers),
            {name.value: np.asarray(values, dtype=np.float64) for name, values in numbers.items()},
            {name.value: np.asarray(values, dtype=np.str_) for name, values in categories.items()},
        )

    def _tokens(self, answer: Answer) -> float:
        return _number(min(answer.tokens, self.cut) if answer.greedy and answer.tokens is not None else None)

    def _logprob(self, answer: Answer) -> float:
        return compared_logprob(answer.logprob, greedy=answer.greedy)

    def _finish_reason(self, answer: Answer) -> str:
        if not answer.greedy or answer.finish_reason is None:
            return NOT_THERE
        return "length" if (answer.tokens or 0) > self.cut else answer.finish_reason

    def _empty(self, answer: Answer) -> str:
        """An answer of tool calls has no text either, and is none."""
        return _yes(answer.text if answer.finish_reason in _ENDS else None, lambda text: not text.strip())

    def _whole(self, answer: Answer) -> str | None:
        """The text, where it ended by itself before held-out answers were cut: a part of JSON is none."""
        ended = answer.finish_reason == "stop" and answer.tokens is not None and answer.tokens <= self.cut
        return answer.text if ended else None

    def _label(self, text: str | None) -> str:
        if text is None:
            return NOT_THERE
        return text.strip() if text.strip() in self._labels else "other"


def is_greedy(temperature: float | None, max_tokens: int | None, cut: int) -> bool:
    """Whether a request was sampled as held-out ones are.

    Args:
        temperature: as the client sent it; None is the model's own default, which mostly is not 0.
        max_tokens: likewise; None is no limit.
        cut: the largest limit of held-out answers, tokens.
    """
    return temperature == 0 and (max_tokens is None or max_tokens >= cut)


def compared_logprob(logprob: float | None, *, greedy: bool) -> float:
    """Return the log-probability of an answer as it is compared; NaN where it is not."""
    return _number(round(logprob, 1) if greedy and logprob is not None else None)


def is_refusal(text: str) -> bool:
    """Whether an answer begins as refusals do."""
    return bool(_REFUSAL.search(text[:_REFUSAL_CHARS].replace("\u2019", "'")))


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _yes(text: str | None, says: Callable[[str], bool]) -> str:
    return NOT_THERE if text is None else YES if says(text) else NO
