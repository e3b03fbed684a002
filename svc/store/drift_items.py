"""Stores drift features for a bounded sample of requests, without any of their text.

Each item belongs to a request's row and is deleted with it. This module does not depend on how features
are computed.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine as Store
from sqlalchemy import Row, Select, delete, insert, select
from sqlalchemy.orm import Session

from svc.store.database import exclusive, write_transaction
from svc.store.tables import DriftItemRow, RequestRow, is_of, target_columns
from svc.version import Target

_VECTOR, _HASHES = np.dtype("<f4"), np.dtype("<i4")
_DELETED_TOGETHER = 2_000  # rows in one transaction: no other writer waits long for it


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """Drift features of one request.

    Attributes:
        prompt: numeric and categorical features of the prompt, keyed by feature name.
        answer: numeric and categorical features of the answer, except for its log-probability, which is
            scored later. The value is None for a feature that the answer lacks. Empty if the version has no
            registered answers to compare with.
        topic: embedding of the prompt, float32.
        wanted: embedding of the answer that the prompt asks for, as predicted from the prompt, float32.
        words: sorted keyed hashes of the prompt's distinct words, int32.
        conversation: keyed hash of the messages up to the first user turn, the same for all turns of a
            conversation.
    """

    request_id: str
    started_at: datetime
    prompt: Mapping[str, float | str]
    answer: Mapping[str, float | str | None]
    topic: NDArray[np.float32]
    wanted: NDArray[np.float32]
    words: NDArray[np.int32]
    conversation: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredItem:
    """Stored drift features of one request, joined with columns from the request's row.

    Attributes:
        id: row id, which increases with each insertion and is never reused.
        logprob: mean log-probability of the answer's tokens, in nats, or None if the answer has not been
            scored.
        client: hash of the request's user or, without a user, the key id; empty if neither is known.
    """

    id: int
    item: Item
    logprob: float | None
    client: str


def add_items(store: Store, target: Target, items: Sequence[Item]) -> int:
    """Store drift items for a version in a given format, atomically.

    Items are skipped if their request has been deleted or already has an item.

    Returns:
        The number of items stored.
    """
    ids = [item.request_id for item in items]
    with exclusive(store) as session:  # no request is deleted between the look-up and the insert
        query = select(RequestRow.request_id, RequestRow.id).where(
            RequestRow.request_id.in_(ids), RequestRow.id.not_in(select(DriftItemRow.request))
        )
        requests = {row.request_id: row.id for row in session.execute(query)}
        rows = [_columns(target, item, requests[item.request_id]) for item in items if item.request_id in requests]
        if rows:
            session.execute(insert(DriftItemRow), rows)
    return len(rows)


def read_items(store: Store, target: Target, *, after: int, newest: int) -> list[StoredItem]:
    """Return drift items of a version in a given format, in insertion order.

    Args:
        after: return only items with a larger id.
        newest: maximum number of items; the newest are returned.
    """
    query = _items_of(target).where(DriftItemRow.id > after).order_by(DriftItemRow.id.desc()).limit(newest)
    with Session(store) as session:
        return [_read(row) for row in reversed(session.execute(query).all())]


def read_items_with(store: Store, target: Target, ids: Sequence[int]) -> list[StoredItem]:
    """Return the drift items with the given ids for a version in a given format, in insertion order. Deleted
    items are skipped.
    """
    query = _items_of(target).where(DriftItemRow.id.in_(ids)).order_by(DriftItemRow.id)
    with Session(store) as session:
        return [_read(row) for row in session.execute(query)]


def item_ids(store: Store, target: Target, *, after: int = 0) -> list[int]:
    """Return the ids of all drift items of a version in a given format, in insertion order.

    Args:
        after: return only larger ids.
    """
    query = select(DriftItemRow.id).where(is_of(DriftItemRow, target), DriftItemRow.id > after)
    with Session(store) as session:
        return list(session.scalars(query.order_by(DriftItemRow.id)))


def prune_items(store: Store, target: Target, keep: Collection[int], newest: int) -> int:
    """Delete all drift items of a version in a given format except those to keep.

    Args:
        keep: ids of items to keep.
        newest: number of newest items to keep as well.

    Returns:
        The number of items deleted.
    """
    ids, keep_ids = item_ids(store, target), set(keep)
    old = [id for id in ids[: max(0, len(ids) - newest)] if id not in keep_ids]
    for start in range(0, len(old), _DELETED_TOGETHER):
        with write_transaction(store) as connection:
            connection.execute(delete(DriftItemRow).where(DriftItemRow.id.in_(old[start : start + _DELETED_TOGETHER])))
    return len(old)


def _items_of(target: Target) -> "Select[DriftItemRow, str, datetime, float | None, str | None, str | None]":
    columns = (
        RequestRow.request_id,
        RequestRow.started_at,
        RequestRow.logprob,
        RequestRow.user_hash,
        RequestRow.key_id,
    )
    joined = select(DriftItemRow, *columns).join(RequestRow, RequestRow.id == DriftItemRow.request)
    return joined.where(is_of(DriftItemRow, target))


def _columns(target: Target, item: Item, request: int) -> dict[str, object]:
    features = json.dumps({"prompt": dict(item.prompt), "answer": dict(item.answer)}, ensure_ascii=False)
    return {
        **target_columns(target),
        "request": request,
        "features": features,
        "topic": item.topic.astype(_VECTOR).tobytes(),
        "wanted": item.wanted.astype(_VECTOR).tobytes(),
        "words": item.words.astype(_HASHES).tobytes(),
        "conversation": item.conversation,
    }


def _read(joined: "Row[DriftItemRow, str, datetime, float | None, str | None, str | None]") -> StoredItem:
    row, request_id, started_at, logprob, user_hash, key_id = joined
    item = Item(
        request_id,
        started_at,
        **json.loads(row.features),
        topic=np.frombuffer(row.topic, _VECTOR),
        wanted=np.frombuffer(row.wanted, _VECTOR),
        words=np.frombuffer(row.words, _HASHES),
        conversation=row.conversation,
    )
    return StoredItem(row.id, item, logprob, user_hash or key_id or "")
