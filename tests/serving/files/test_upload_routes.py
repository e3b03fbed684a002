"""Tests the endpoints for uploads in parts with the official client."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import FileObject, Upload
from openai.types.uploads import UploadPart
from sqlalchemy import Engine as Store
from sqlalchemy import update

from serving.files import upload_rows as uploads
from svc.identity.principal import Scope
from svc.settings.client_apis import FilesSettings
from svc.store.tables import UploadRow
from tests.builders.client_files import FORM, form
from tests.serving.fine_tuning.fine_tuning_service import FineTuningService, strict

MEGABYTE = 2**20


@pytest.fixture
async def service(socket_folder: Path, store: Store) -> AsyncIterator[FineTuningService]:
    limits = FilesSettings(max_mb=1, max_upload_gb=3 / 1024, max_total_gb=5 / 1024, min_free_gb=0)
    service = FineTuningService(socket_folder, store=store, base=None, limits=limits)
    async with service.run():
        yield service


@pytest.fixture
async def client(service: FineTuningService) -> AsyncIterator[AsyncOpenAI]:
    async with service.official() as client:
        yield client


async def created(client: AsyncOpenAI, **options: Any) -> Upload:
    given: dict[str, Any] = {"bytes": 6, "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    return await client.uploads.create(**(given | options))


def parts_on_disk(service: FineTuningService) -> list[str]:
    return [path.name for path in (service.folder / "uploads").glob("*/*")]


@pytest.mark.slow
async def test_file_too_large_for_one_request_is_uploaded_in_parts(
    service: FineTuningService, client: AsyncOpenAI
) -> None:
    content = bytes(range(256)) * (3 * MEGABYTE // 256)
    upload = await client.uploads.upload_file_chunked(
        file=content,
        filename="../large.jsonl",
        bytes=len(content),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=700_000,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert (upload.file.filename, upload.file.bytes, upload.file.status) == ("large.jsonl", len(content), "uploaded")
    assert (await client.files.content(upload.file.id)).content == content
    assert await client.files.retrieve(upload.file.id) == upload.file
    assert parts_on_disk(service) == []


@pytest.mark.slow
async def test_upload_api_returns_complete_upload_and_part_objects(client: AsyncOpenAI) -> None:
    given = {"bytes": 2, "filename": "a", "mime_type": "text/jsonl", "purpose": "batch"}
    raw: Any = await client.post("/uploads", cast_to=object, body=given)
    upload = strict(Upload, raw)
    assert (upload.status, upload.purpose, upload.bytes, upload.file) == ("pending", "batch", 2, None)
    assert upload.expires_at == upload.created_at + 3600
    part = await client.uploads.parts.create(upload.id, data=b"{}")
    assert strict(UploadPart, part.model_dump()).upload_id == upload.id
    completing = {"part_ids": [part.id]}
    raw = await client.post(f"/uploads/{upload.id}/complete", cast_to=object, body=completing)
    file = strict(FileObject, raw["file"])
    assert strict(Upload, raw).status == "completed"
    assert file.expires_at == file.created_at + 30 * 86_400
    again = await client.post(f"/uploads/{upload.id}/complete", cast_to=object, body=completing)
    assert again == raw  # as the client's own retry
    await client.files.delete(file.id)
    assert (await client.uploads.complete(upload.id, part_ids=[part.id])).file is None


@pytest.mark.slow
async def test_upload_parts_are_joined_in_the_order_given_at_completion(client: AsyncOpenAI) -> None:
    upload = await created(client, expires_after={"anchor": "created_at", "seconds": 7200})
    parts = await asyncio.gather(*(client.uploads.parts.create(upload.id, data=data) for data in (b"ab", b"cd", b"ef")))
    done = await client.uploads.complete(upload.id, part_ids=[parts[2].id, parts[0].id, parts[1].id])
    assert done.file is not None
    assert (await client.files.content(done.file.id)).content == b"efabcd"
    assert done.file.expires_at == done.file.created_at + 7200


@pytest.mark.slow
async def test_upload_stays_pending_if_its_parts_do_not_match_the_announced_size(
    service: FineTuningService, client: AsyncOpenAI
) -> None:
    upload = await created(client)
    one = await client.uploads.parts.create(upload.id, data=b"abcd")
    with pytest.raises(openai.BadRequestError, match="7 bytes"):
        await client.uploads.parts.create(upload.id, data=b"efg")
    two = await client.uploads.parts.create(upload.id, data=b"ef")
    for ids, words in (([one.id], "4 bytes"), ([one.id, one.id], "twice")):
        with pytest.raises(openai.BadRequestError, match=words):
            await client.uploads.complete(upload.id, part_ids=ids)
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.uploads.complete(upload.id, part_ids=[one.id, "../\0"])
    assert unknown.value.param == "part_ids"
    with pytest.raises(openai.BadRequestError, match="MD5"):
        await client.uploads.complete(upload.id, part_ids=[one.id, two.id], md5="0" * 32)
    assert service.contents() == []
    assert (await client.uploads.complete(upload.id, part_ids=[one.id, two.id])).status == "completed"


@pytest.mark.slow
async def test_cancelled_upload_leaves_no_parts_behind(service: FineTuningService, client: AsyncOpenAI) -> None:
    upload = await created(client)
    part = await client.uploads.parts.create(upload.id, data=b"abcdef")
    assert (await client.uploads.cancel(upload.id)).status == "cancelled"
    assert (await client.uploads.cancel(upload.id)).status == "cancelled"
    assert parts_on_disk(service) == []
    for request in (
        client.uploads.parts.create(upload.id, data=b"a"),
        client.uploads.complete(upload.id, part_ids=[part.id]),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            await request
        assert error.value.code == "upload_ended"
    assert service.contents() == []


@pytest.mark.slow
async def test_requests_for_an_expired_upload_are_rejected(client: AsyncOpenAI, store: Store) -> None:
    upload = await created(client)
    part = await client.uploads.parts.create(upload.id, data=b"abcdef")
    with store.begin() as connection:
        connection.execute(update(UploadRow).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    for request in (
        client.uploads.parts.create(upload.id, data=b"a"),
        client.uploads.complete(upload.id, part_ids=[part.id]),
        client.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.BadRequestError, match="expired"):
            await request


@pytest.mark.slow
async def test_concurrent_requests_to_complete_one_upload_create_one_file(
    service: FineTuningService, client: AsyncOpenAI
) -> None:
    upload = await created(client)
    part = await client.uploads.parts.create(upload.id, data=b"abcdef")
    completions = (client.uploads.complete(upload.id, part_ids=[part.id]) for _ in range(5))
    completed = await asyncio.gather(*completions)
    assert len({each.file.id for each in completed if each.file}) == 1
    assert {each.status for each in completed} == {"completed"}
    assert len(service.contents()) == 1


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"filename": "a\0"}, "filename"),
        ({"filename": "x" * 10_000}, "filename"),
        ({"filename": ".."}, "filename"),
        ({"bytes": 0}, "bytes"),
        ({"bytes": 10**30}, "bytes"),
        ({"purpose": "vision"}, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after"),
        ({"extra_body": {"path": "x"}}, "path"),
    ],
    ids=range(8),
)
async def test_upload_creation_with_an_invalid_field_is_rejected(
    client: AsyncOpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await created(client, **options)
    assert error.value.param == param


async def test_lone_surrogate_in_a_file_name_is_rejected(service: FineTuningService) -> None:
    body = b'{"bytes": 6, "filename": "a\\ud800", "mime_type": "a", "purpose": "batch"}'
    async with service.socket_client() as client:
        answer = await client.post("/v1/uploads", headers={"content-type": "application/json"}, content=body)
    assert answer.status_code == 400, answer.text


@pytest.mark.slow
async def test_size_and_storage_limits_apply_to_uploads(
    service: FineTuningService, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        await created(client, bytes=3 * MEGABYTE + 1)
    assert (error.value.status_code, error.value.code) == (413, "file_too_large")
    for _ in range(2):
        upload = await created(client, bytes=2 * MEGABYTE)
        await client.uploads.parts.create(upload.id, data=b"x" * 2 * MEGABYTE)
    with pytest.raises(openai.BadRequestError) as full:  # parts count
        await created(client, bytes=2 * MEGABYTE)
    assert full.value.code == "storage_limit"
    monkeypatch.setattr(uploads, "MAX_OPEN", 2)
    with pytest.raises(openai.BadRequestError, match="2 unfinished uploads"):
        await created(client)
    monkeypatch.setattr("serving.files.upload_routes.MAX_PART_BYTES", 1000)
    with pytest.raises(openai.APIStatusError) as large:
        await client.uploads.parts.create(upload.id, data=b"x" * 1001)
    assert large.value.code == "file_too_large"
    monkeypatch.setattr(uploads, "MAX_PARTS", 1)
    with pytest.raises(openai.BadRequestError, match="1 parts"):
        await client.uploads.parts.create(upload.id, data=b"x")
    assert len(parts_on_disk(service)) == 2


@pytest.mark.slow
async def test_malformed_upload_part_is_rejected(service: FineTuningService, client: AsyncOpenAI) -> None:
    upload = await created(client)
    async with service.socket_client() as raw:
        for body in (form(), b"", b"x"):
            answer = await raw.post(f"/v1/uploads/{upload.id}/parts", headers=FORM, content=body)
            assert answer.status_code == 400, answer.text
    with pytest.raises(openai.BadRequestError):
        await client.uploads.parts.create(upload.id, data=b"")
    assert parts_on_disk(service) == []


@pytest.mark.slow
async def test_keys_do_not_see_each_others_uploads(service: FineTuningService) -> None:
    async with service.official(service.key(Scope.FILES)) as client:
        upload = await created(client)
        part = await client.uploads.parts.create(upload.id, data=b"abcdef")
    async with service.official(service.key(Scope.FILES)) as client:
        for request in (
            client.uploads.parts.create(upload.id, data=b"a"),
            client.uploads.complete(upload.id, part_ids=[part.id]),
            client.uploads.cancel(upload.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await request
