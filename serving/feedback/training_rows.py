"""Converts users' feedback on answers to rows of training data.

A correction is preferred to the model's answer, so the two form a preference pair. A rating is a label for the model's
answer.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from svc.dataset.problem.problem import RowError
from svc.dataset.readers.openai_evals import chat_turns
from svc.dataset.readers.preferences import pair_row
from svc.dataset.schema.example import ChatExample, parse_example
from svc.dataset.schema.objective import Objective
from svc.dataset.schema.preference import PreferencePair
from svc.dataset.schema.tool_calls import calls_in, decode_inner
from svc.dataset.text.plain_text import is_blank
from svc.dataset.text.thinking import without_thinking
from svc.store.feedback import RatedText, Rating

Row = dict[str, Any]


class Unused(StrEnum):
    """Reason why the feedback on an answer provides no training data."""

    NOT_STORED = "the prompt and the answer are not stored"
    NOT_TEXT = "the conversation has tools, or other content than text"
    NO_CORRECTION = "there is no correction, or it equals the answer"


def training_rows(rated: RatedText, objective: Objective) -> list[Row] | Unused:
    """Return the rows of training data from an answer's feedback, or the reason why there are none.

    Args:
        objective: determines the kind of rows: chat examples with the correction, pairs of correction and answer, or
            labeled answers.
    """
    if rated.prompt is None or rated.answer is None:
        return Unused.NOT_STORED
    turns = decode_inner(rated.prompt)
    if not isinstance(turns, list) or calls_in(rated.answer):  # a text is the prompt of a plain completion
        return Unused.NOT_TEXT
    correction = rated.feedback.correction or ""
    try:
        given = _example(turns, without_thinking(rated.answer))
        is_other = not is_blank(correction) and correction.strip() != given.answer.strip()
        corrected = _example(turns, correction) if is_other else None
    except RowError:
        return Unused.NOT_TEXT
    if objective is Objective.KTO:
        rows = [given.as_dict() | {"label": rated.feedback.rating is Rating.GOOD}]
        return [*rows, corrected.as_dict() | {"label": True}] if corrected else rows
    if corrected is None:
        return Unused.NO_CORRECTION
    return [corrected.as_dict() if objective is Objective.SFT else pair_row(PreferencePair(corrected, given))]


def _example(turns: Sequence[Row], answer: str) -> ChatExample:
    return parse_example({"messages": [*chat_turns(turns, "messages"), {"role": "assistant", "content": answer}]})
