"""How likely a version finds what it answered: which rows can be scored, and where the score goes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, func, select, update
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.answered import answered_by
from svc.store.tables import RequestRow
from svc.version import Target

_ENDS = ("stop", "length")  # and not tool calls, of which no text is kept
_BLANKS = " \t\r\n"
MOST_TOKENS = 2_048
"""Of prompt and answer together. vLLM does not budget the memory for the log-probabilities of a prompt, and their JSON
takes a hundred bytes a token."""


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """A row whose content was kept.

    Attributes:
        prompt: JSON of the messages.
    """

    id: int
    prompt: str
    answer: str


def newest_unscored(
    store: Store, target: Target, *, route: str, since: datetime, without: Sequence[str], passed: Collection[int]
) -> KeptAnswer | None:
    """The newest greedy answer of a version in a format that has no score yet.

    Args:
        route: where it was asked.
        since: answers to older requests are left out.
        without: texts that neither prompt nor answer may hold.
        passed: rows to leave out; some hundreds at most.
    """
    query = (
        select(RequestRow.id, RequestRow.prompt, RequestRow.answer)
        .where(answered_by(target), _can_be_scored(without))
        .where(RequestRow.route == route, RequestRow.started_at >= since, RequestRow.id.not_in(passed))
        .order_by(RequestRow.started_at.desc())  # as the index that also finds the hour: else all rows are looked at
        .limit(1)
    )
    with Session(store) as session:
        found = session.execute(query).first()
    return KeptAnswer(found.id, found.prompt or "", found.answer or "") if found else None


def keep_logprob(store: Store, row: int, logprob: float) -> None:
    """Writes the score of a row; nothing, where it was forgotten meanwhile."""
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
        *(~content.contains(text, autoescape=True) for content in contents for text in without),
    )
