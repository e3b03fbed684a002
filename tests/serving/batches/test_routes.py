"""Tests the endpoints for batches with the official client. The answers are tested in tests/serving/batches."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch
from sqlalchemy import Engine as Store
from sqlalchemy import update

from serving.batches import routes as batches
from serving.batches.rows import BatchError, BatchProgress, BatchResult, end_batch
from serving.files.rows import ClientFile, FileStatus
from svc.identity.principal import Scope
from svc.settings.client_apis import FilesSettings
from svc.store import audit
from svc.store.statuses import BatchStatus
from svc.store.tables import BatchRow
from tests.serving.batches.batch_service import CHAT_PATH, BatchService, line, lines
from tests.serving.fine_tuning.fine_tuning_service import strict

WINDOW: dict[str, Any] = {"completion_window": "24h"}


async def raw(client: AsyncOpenAI, path: str = "", **query: Any) -> Any:
    """Return the JSON that the server sends for a path."""
    return await client.get(f"/batches{path}", cast_to=object, options={"params": query})


@pytest.mark.slow
async def test_batch_creation_returns_a_complete_batch_object(service: BatchService, client: AsyncOpenAI) -> None:
    file = service.add_input(line("a"))
    created = await client.batches.create(
        input_file_id=file,
        endpoint=CHAT_PATH,
        metadata={"team": "a"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
        **WINDOW,
    )
    batch = strict(Batch, await raw(client, f"/{created.id}"))
    assert batch == created == await client.batches.retrieve(created.id)
    assert (batch.status, batch.endpoint, batch.input_file_id) == ("validating", CHAT_PATH, file)
    assert (batch.metadata, batch.errors, batch.output_file_id, batch.model) == ({"team": "a"}, None, None, None)
    assert batch.expires_at is not None and batch.expires_at - batch.created_at == 24 * 3600
    assert batch.request_counts is not None and batch.request_counts.total == 0


async def test_failed_batch_shows_its_errors_by_line(service: BatchService, client: AsyncOpenAI, store: Store) -> None:
    created = await client.batches.create(input_file_id=service.add_input(line("a")), endpoint=CHAT_PATH, **WINDOW)
    error = BatchError("invalid_json_line", "the line is not JSON", line=2)
    progress = BatchProgress(completed=1, failed=2, tokens_in=3, tokens_out=4)
    end_batch(store, created.id, BatchResult(BatchStatus.FAILED, progress, errors=[error]), lease=None)
    batch = strict(Batch, await raw(client, f"/{created.id}"))
    assert batch.errors is not None and batch.errors.data is not None and batch.usage is not None
    (shown,) = batch.errors.data
    assert (shown.code, shown.message, shown.line, shown.param) == (error.code, error.message, 2, None)
    assert (batch.status, batch.failed_at is None, batch.usage.total_tokens) == ("failed", False, 7)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": "/v1/messages"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-unknown"}, "input_file_id"),
        ({"input_file_id": "../../x"}, "input_file_id"),
        ({"input_file_id": "\0"}, "input_file_id"),
        ({"input_file_id": "x" * 10_000}, "input_file_id"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"metadata": {"x": "y" * 513}}, "metadata.x"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"priority": 1}, "priority"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
async def test_batch_creation_with_an_invalid_field_is_rejected(
    service: BatchService, client: AsyncOpenAI, change: dict[str, Any], param: str
) -> None:
    body = {"input_file_id": service.add_input(line("a")), "endpoint": CHAT_PATH, **WINDOW} | change
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post("/batches", body=body, cast_to=object)
    assert caught.value.param == param or caught.value.code == "invalid_json"
    assert (await client.batches.list()).data == []


@pytest.mark.slow
async def test_identical_create_requests_create_only_one_batch(
    service: BatchService, client: AsyncOpenAI, store: Store
) -> None:
    given: dict[str, Any] = {"input_file_id": service.add_input(line("a")), "endpoint": CHAT_PATH, **WINDOW}
    created = await asyncio.gather(
        *(client.batches.create(**given, metadata={"a": "1", "b": "2"}) for _ in range(10)),
        *(client.batches.create(**given, metadata={"b": "2", "a": "1"}) for _ in range(10)),
    )
    assert len({batch.id for batch in created}) == 1
    assert [event.action for event in audit.read_events(store, newest=10)] == ["batch.create"]
    assert (await client.batches.create(**given)).id != created[0].id


async def test_batch_is_refused_if_its_answers_would_exceed_the_storage_limit_of_the_key(
    socket_folder: Path, store: Store
) -> None:
    limits = FilesSettings(max_total_gb=1000 / 2**30, min_free_gb=0)
    service = BatchService(socket_folder, store=store, limits=limits)
    async with service.run(), service.official() as client:
        input_file = service.add_input(lines(5))
        with pytest.raises(openai.BadRequestError) as caught:
            await client.batches.create(input_file_id=input_file, endpoint=CHAT_PATH, **WINDOW)
    assert caught.value.code == "storage_limit"


async def test_batch_creation_is_rejected_if_its_file_is_deleted_concurrently(
    service: BatchService, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = batches._find_usable

    def find_and_delete(store: Store, id: str, owner: str | None) -> ClientFile:
        found = find(store, id, owner)
        service.files.delete(id)
        return found

    monkeypatch.setattr(batches, "_find_usable", find_and_delete)
    with pytest.raises(openai.BadRequestError, match="there is no file") as caught:
        await client.batches.create(input_file_id=service.add_input(line("a")), endpoint=CHAT_PATH, **WINDOW)
    assert caught.value.param == "input_file_id"
    assert (await client.batches.list()).data == []


async def test_batch_is_refused_if_its_file_has_errors_or_the_wrong_purpose(
    service: BatchService, client: AsyncOpenAI
) -> None:
    broken = service.add_input("{", status=FileStatus.ERROR, details="line 1: not JSON")
    for file, message in ((service.add_file(), "purpose batch"), (broken, "line 1: not JSON")):
        with pytest.raises(openai.BadRequestError, match=message):
            await client.batches.create(input_file_id=file, endpoint=CHAT_PATH, **WINDOW)


@pytest.mark.slow
async def test_batches_are_listed_in_pages_without_gaps(
    service: BatchService, client: AsyncOpenAI, store: Store
) -> None:
    file, ids = service.add_input(line("a")), list[str]()
    for number in range(5):
        given = {"number": str(number)}
        created = await client.batches.create(input_file_id=file, endpoint=CHAT_PATH, metadata=given, **WINDOW)
        ids.insert(0, created.id)
        with store.begin() as connection:
            moment = datetime.now(UTC) + timedelta(seconds=number)
            connection.execute(update(BatchRow).where(BatchRow.id == created.id).values(created_at=moment))
    assert [batch.id async for batch in client.batches.list(limit=2)] == ids
    page = await raw(client, limit=2, after=ids[0])
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[1], ids[2], True)
    with pytest.raises(openai.NotFoundError):
        await client.batches.list(after="batch_unknown")
    for limit in ("0", "101", "x"):
        with pytest.raises(openai.BadRequestError):
            await raw(client, limit=limit)


@pytest.mark.slow
async def test_keys_do_not_see_each_others_batches_and_files(service: BatchService) -> None:
    alice, bob, root = (service.key(*scopes) for scopes in [(Scope.FILES, Scope.INFER)] * 2 + [(Scope.ADMIN,)])
    file = service.add_input(line("a"), owner=alice.key.id)
    async with service.official(alice) as client:
        id = (await client.batches.create(input_file_id=file, endpoint=CHAT_PATH, **WINDOW)).id
    async with service.official(bob) as client:
        for call in (client.batches.retrieve, client.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="hidden"):
                await call(id)
        assert (await client.batches.list()).data == []
        with pytest.raises(openai.BadRequestError, match="there is no file"):
            await client.batches.create(input_file_id=file, endpoint=CHAT_PATH, **WINDOW)
    async with service.official(root) as client:
        assert [batch.id for batch in (await client.batches.list()).data] == [id]


@pytest.mark.slow
async def test_batch_creation_requires_a_key_with_the_files_and_infer_scopes(service: BatchService) -> None:
    for scope, missing in ((Scope.INFER, "files"), (Scope.FILES, "infer")):
        key = service.key(scope)
        async with service.official(key) as client:
            file = service.add_input(line("a"), owner=key.key.id)
            with pytest.raises(openai.PermissionDeniedError, match=f"lacks scope {missing}"):
                await client.batches.create(input_file_id=file, endpoint=CHAT_PATH, **WINDOW)


@pytest.mark.slow
async def test_batch_can_be_cancelled_repeatedly_but_not_after_it_has_ended(
    service: BatchService, client: AsyncOpenAI, store: Store
) -> None:
    created = await client.batches.create(input_file_id=service.add_input(line("a")), endpoint=CHAT_PATH, **WINDOW)
    cancelling = await client.batches.cancel(created.id)
    assert (cancelling.status, cancelling.cancelling_at is None) == ("cancelling", False)
    assert await client.batches.cancel(created.id) == cancelling
    actions = [event.action for event in audit.read_events(store, newest=10)]
    assert actions == ["batch.create", "batch.cancel"]
    with store.begin() as connection:
        connection.execute(update(BatchRow).values(status="completed"))
    with pytest.raises(openai.BadRequestError, match="has already ended: completed") as caught:
        await client.batches.cancel(created.id)
    assert caught.value.code == "batch_ended"
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.slow
async def test_batch_is_rejected_when_its_key_has_too_many_unfinished_batches(
    service: BatchService, client: AsyncOpenAI
) -> None:
    file = service.add_input(line("a"))
    for number in range(20):
        given = {"number": str(number)}
        await client.batches.create(input_file_id=file, endpoint=CHAT_PATH, metadata=given, **WINDOW)
    with pytest.raises(openai.RateLimitError, match="this key has 20 unfinished batches"):
        await client.batches.create(input_file_id=file, endpoint=CHAT_PATH, **WINDOW)
