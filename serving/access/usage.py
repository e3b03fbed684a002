"""API key usage: requests and tokens by hour, key and model. These totals outlive the request log's rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Engine as Store
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from svc.store.database import upsert, write_transaction
from svc.store.tables import UsageRow


class UsageOf(NamedTuple):
    """Hour, key and model to which a usage record belongs.

    Attributes:
        hour: start of the hour.
        key_id: id of the API key; empty for requests without a key.
    """

    hour: datetime
    key_id: str
    model: str


class Usage(NamedTuple):
    """Counts of requests and tokens. It is a tuple for speed, because each request creates an instance."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def tokens(self) -> int:
        """Total number of prompt and answer tokens."""
        return self.tokens_in + self.tokens_out

    def plus(self, other: "Usage") -> "Usage":
        """Return the sum of this usage and another usage."""
        return Usage(
            self.requests + other.requests, self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out
        )

    def minus(self, other: "Usage") -> "Usage":
        """Return the difference between this usage and another usage. Its counts may be negative."""
        return Usage(
            self.requests - other.requests, self.tokens_in - other.tokens_in, self.tokens_out - other.tokens_out
        )


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """A key's total usage of a model (see `UsageOf`)."""

    key_id: str
    model: str
    usage: Usage


class DayOf(NamedTuple):
    """UTC day and key that usage totals belong to.

    Attributes:
        midnight: start of the day.
        key_id: id of the API key; empty for requests without a key.
    """

    midnight: datetime
    key_id: str


def midnight_of(moment: datetime) -> datetime:
    """Return the start of the UTC day that contains the given time."""
    return hour_of(moment).replace(hour=0)


def hour_of(moment: datetime) -> datetime:
    """Return the start of the hour that contains the given time."""
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def add_usage(store: Store, used: Mapping[UsageOf, Usage]) -> None:
    """Add usage to the stored totals, atomically. Several processes may call this concurrently."""
    if not used:
        return
    row = upsert(store, UsageRow)
    total = {name: getattr(UsageRow, name) + row.excluded[name] for name in Usage._fields}
    add = row.on_conflict_do_update(index_elements=UsageOf._fields, set_=total)
    with write_transaction(store) as connection:
        connection.execute(add, [of._asdict() | each._asdict() for of, each in used.items()])


def usage_since(store: Store, since: datetime) -> list[UsageTotal]:
    """Return usage totals by key and model since the start of the hour that contains `since`, largest first."""
    tokens_in, tokens_out = func.sum(UsageRow.tokens_in), func.sum(UsageRow.tokens_out)
    query = (
        select(UsageRow.key_id, UsageRow.model, func.sum(UsageRow.requests), tokens_in, tokens_out)
        .where(UsageRow.hour >= hour_of(since))
        .group_by(UsageRow.key_id, UsageRow.model)
        .order_by((tokens_in + tokens_out).desc(), UsageRow.key_id, UsageRow.model)
    )
    with Session(store) as session:
        rows = session.execute(query)
        # PostgreSQL's sums of integers are decimals.
        return [UsageTotal(key_id, model, Usage(*map(int, figures))) for key_id, model, *figures in rows]


def usage_by_day(store: Store, midnight: datetime) -> dict[DayOf, Usage]:
    """Return each key's usage totals for the UTC day that begins at `midnight`, and for the day before."""
    today, sums = UsageRow.hour >= midnight, [func.sum(getattr(UsageRow, name)) for name in Usage._fields]
    yesterday = midnight - timedelta(days=1)
    query = select(today, UsageRow.key_id, *sums).where(UsageRow.hour >= yesterday).group_by(today, UsageRow.key_id)
    with Session(store) as session:
        return {
            DayOf(midnight if of_today else yesterday, key_id): Usage(*map(int, figures))
            for of_today, key_id, *figures in session.execute(query)
        }


def last_used(store: Store) -> dict[str, datetime]:
    """Return the hour in which each API key was last used."""
    with Session(store) as session:
        query = select(UsageRow.key_id, func.max(UsageRow.hour, type_=UsageRow.hour.type)).group_by(UsageRow.key_id)
        return {row[0]: row[1] for row in session.execute(query)}
