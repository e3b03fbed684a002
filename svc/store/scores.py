"""Selects stored answers to be scored by likelihood, and stores their scores."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, func, select, update
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.answered import answered_by
from svc.store.kept_requests import CALL
from svc.store.tables import RequestRow
from svc.version import Target

_ENDS = ("stop", "length")
_BLANKS = " \t\r\n"
MOST_TOKENS = 2_048
"""Maximum total number of tokens in a scored prompt and its answer. vLLM does not budget memory for prompt
log-probabilities, and their JSON takes a hundred bytes per token."""


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """The stored prompt and answer of a request.

    Attributes:
        prompt: JSON of the messages.
    """

    id: int
    prompt: str
    answer: str


def newest_unscored(
    store: Store, target: Target, *, route: str, since: datetime, without: Sequence[str], passed: Collection[int]
) -> KeptAnswer | None:
    """Return the newest greedy answer of a version in a given format that has not been scored yet.

    Args:
        route: the request's route.
        since: skip requests older than this.
        without: skip rows whose prompt or answer contains any of these strings.
        passed: ids of rows to skip, at most a few hundred.
    """
    query = (
        select(RequestRow.id, RequestRow.prompt, RequestRow.answer)
        .where(answered_by(target), _can_be_scored(without))
        .where(RequestRow.route == route, RequestRow.started_at >= since, RequestRow.id.not_in(passed))
        .order_by(RequestRow.started_at.desc())  # the index that also finds the hour: else all rows are scanned
        .limit(1)
    )
    with Session(store) as session:
        row = session.execute(query).first()
    return KeptAnswer(row.id, row.prompt or "", row.answer or "") if row else None


def keep_logprob(store: Store, row: int, logprob: float) -> None:
    """Store the score of a row's answer, unless the row has been deleted."""
    with store.begin() as connection:
        connection.execute(update(RequestRow).where(RequestRow.id == row).values(logprob=logprob))


def _can_be_scored(without: Sequence[str]) -> ColumnElement[bool]:
    contents = (RequestRow.prompt, RequestRow.answer)
    return and_(
        RequestRow.status == 200,
        RequestRow.temperature == 0,
        RequestRow.finish_reason.in_(_ENDS),
        RequestRow.logprob.is_(None),
        RequestRow.tokens_in + RequestRow.tokens_out <= MOST_TOKENS,
        RequestRow.prompt.is_not(None),
        func.trim(RequestRow.answer, _BLANKS) != "",
        RequestRow.answer.not_like(CALL),  # a tool call
        RequestRow.answer.not_like(f"%\n{CALL}"),
        *(~content.contains(text, autoescape=True) for content in contents for text in without),
    )
