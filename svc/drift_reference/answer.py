"""Human-readable features of an answer, such as its length, how it ended, and whether it has the format that the task
requires.

The length, finish reason and likelihood of an answer depend on how it was sampled, and held-out answers are generated
with greedy decoding. These three features are therefore compared only for live answers at temperature 0. Otherwise,
every client with a higher temperature would look like drift. Each held-out example has its own token limit, derived
from its reference answer. Live prompts have no reference, so live answers are treated as if they had been truncated at
the highest of these limits.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from svc.dataset.schema.tool_calls import calls_in
from svc.dataset.text.thinking import without_thinking
from svc.drift_reference.sample import NO, NOT_THERE, YES, Sample
from svc.evaluation.metrics.json_answers import is_json

_ENDED = ("stop", "tool_calls")
"""Finish reasons of answers that were ended by the model rather than by a token limit."""
_MAX_LABELS = 30
_MIN_PER_LABEL = 3
"""Minimum average number of references per distinct answer. Below this number, the answers do not count as labels."""
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)"
    r"|i (?:can(?:'t|not| not)|won't|will not) (?:help|assist|answer|provide|do|comply|fulfil)"
    r"|as an ai\b|against my (?:guidelines|programming))",
    re.IGNORECASE,
)
_REFUSAL_CHARS = 200
"""Number of characters at the start of an answer that are searched for a refusal."""


class AnswerFeature(StrEnum):
    """The features by which answers are compared. Each has its own row in the drift table."""

    TOKENS = "answer_tokens"
    """Length in tokens, capped at the highest token limit among the held-out examples. Used only for greedy answers."""
    LOGPROB = "answer_logprob"
    """Mean log-probability of the answer's tokens, rounded to tenths of a nat because repeated scoring of the same
    answer gives results that differ by hundredths of a nat. Used only for greedy answers that have been scored."""
    FINISH_REASON = "finish_reason"
    """Why the answer ended: `stop`, `length` or `tool_calls`. Compared only for greedy answers."""
    EMPTY = "empty"
    REFUSAL = "refusal"
    """Whether the answer starts like a refusal in English."""
    VALID_JSON = "valid_json"
    """Whether the answer is JSON. Used only if all held-out references are JSON, and only for complete answers that
    are no longer than the highest token limit among the held-out examples."""
    LABEL = "label"
    """The answer if it is one of the labels, otherwise `other`. Used only if the references consist of a few labels,
    and only for complete answers that are no longer than the highest token limit among the held-out examples."""


@dataclass(frozen=True, slots=True)
class ComparedAnswer:
    """The properties of an answer from which its features are computed. Unknown properties are None.

    Attributes:
        greedy: whether the answer was sampled like the held-out answers. If not, its length, finish reason
            and likelihood are not compared.
        logprob: mean log-probability of the answer's tokens, in nats.
    """

    text: str | None
    tokens: int | None
    finish_reason: str | None
    logprob: float | None
    greedy: bool


class AnswerSampler:
    """Computes the features of answers, and returns them as samples that can be compared with each other.

    Args:
        references: reference answers of the held-out set, which show whether the task asks for JSON or labels.
        cut: length in tokens above which live answers count as truncated. This is the highest token limit among the
            held-out examples.
    """

    def __init__(self, references: Sequence[str], cut: int) -> None:
        self.cut = cut
        references = list(map(without_thinking, references))
        labels = {reference.strip() for reference in references}
        are_labels = len(labels) <= min(_MAX_LABELS, len(references) / _MIN_PER_LABEL)
        self._labels = labels if are_labels else set()
        calls = any(map(calls_in, references))
        self._wants_json = bool(references) and not calls and all(map(is_json, references))

    def sample(self, answers: Sequence[ComparedAnswer]) -> Sample:
        """Return the features of the given answers.

        Features of the text ignore thinking, which varies more than the final answer.
        """
        answers = [
            answer if answer.text is None else replace(answer, text=without_thinking(answer.text)) for answer in answers
        ]
        numbers = {
            AnswerFeature.TOKENS: [self._tokens(answer) for answer in answers],
            AnswerFeature.LOGPROB: [compared_logprob(answer.logprob, greedy=answer.greedy) for answer in answers],
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
        return Sample.of(len(answers), numbers, categories)

    def _tokens(self, answer: ComparedAnswer) -> float:
        return _number(min(answer.tokens, self.cut) if answer.greedy and answer.tokens is not None else None)

    def _finish_reason(self, answer: ComparedAnswer) -> str:
        if not answer.greedy or answer.finish_reason is None:
            return NOT_THERE
        return "length" if (answer.tokens or 0) > self.cut else answer.finish_reason

    def _empty(self, answer: ComparedAnswer) -> str:
        known = answer.finish_reason in (*_ENDED, "length")
        return _yes(answer.text if known else None, lambda text: not text.strip())

    def _whole(self, answer: ComparedAnswer) -> str | None:
        """Return the answer's text if the model ended it within `cut` tokens, or None otherwise."""
        ended = answer.finish_reason in _ENDED and answer.tokens is not None and answer.tokens <= self.cut
        return answer.text if ended else None

    def _label(self, text: str | None) -> str:
        if text is None:
            return NOT_THERE
        return text.strip() if text.strip() in self._labels else "other"


def is_greedy(temperature: float | None, max_tokens: int | None, cut: int) -> bool:
    """Return whether a request used greedy decoding, as held-out requests do, with a high enough token limit.

    Args:
        temperature: temperature in the request, or None for the model's own default, which is rarely 0.
        max_tokens: token limit in the request, or None if there is no limit.
        cut: highest token limit among the held-out examples. The request's own limit must not be lower.
    """
    return temperature == 0 and (max_tokens is None or max_tokens >= cut)


def compared_logprob(logprob: float | None, *, greedy: bool) -> float:
    """Round a log-probability for comparison. Return NaN if the answer has no score or is not greedy."""
    return _number(round(logprob, 1) if greedy and logprob is not None else None)


def is_refusal(text: str) -> bool:
    """Return whether an answer starts like a refusal."""
    return bool(_REFUSAL.search(text[:_REFUSAL_CHARS].replace("\u2019", "'")))


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _yes(text: str | None, predicate: Callable[[str], bool]) -> str:
    return NOT_THERE if text is None else YES if predicate(text) else NO
