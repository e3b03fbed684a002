"""Tests two gateways over one store and one object store: each uses the files that the other one has received."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI
from sqlalchemy import Engine as Store
from sqlalchemy import update

from serving.batches import batch_run, batch_runner
from serving.files import client_files
from serving.files.checks import FileChecks
from serving.files.content_check import ContentCheck
from serving.files.rows import FileStatus, Purpose, find_file
from serving.fine_tuning.creation import JobCreation, decide_job
from serving.fine_tuning.queue import JobResult
from serving.fine_tuning.rows import Job, find_job
from serving.fine_tuning.worker import JobWorker
from serving.store_changes.changes import Changes
from svc.registry.objects import ObjectStore
from svc.settings.client_apis import FilesSettings
from svc.settings.storage import ArtifactSettings
from svc.store.statuses import JobStatus
from svc.store.tables import FileRow, JobRow
from svc.version import VersionId
from tests.builders.client_files import EXAMPLE
from tests.object_store import Bucket, Fault
from tests.serving.batches.batch_service import BatchService, create, ended, lines
from tests.serving.control import until
from tests.serving.fine_tuning.fine_tuning_service import BASE, FakeCheck, FineTuningService
from tests.serving.fine_tuning.worker_home import PACE, fake_command

pytestmark = pytest.mark.slow

CONTENT = EXAMPLE.encode() * 3


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten all pauses, and repeat failed requests to the object store once only."""
    monkeypatch.setattr(client_files, "ObjectStore", partial(ObjectStore, retries=1))
    monkeypatch.setattr(batch_runner, "_POLL_S", 0.02)
    monkeypatch.setattr(batch_run, "_RECORD_S", 0.02)
    monkeypatch.setattr(batch_run, "RETRY_S", 0.05)


@pytest.fixture
async def services(
    socket_folder: Path, any_store: Store, bucket: Bucket, tmp_path: Path
) -> AsyncIterator[tuple[BatchService, BatchService]]:
    """Run two gateways with their own homes."""
    (tmp_path / "base").mkdir()
    async with AsyncExitStack() as stack:
        services = []
        for name in ("1", "2"):
            (socket_folder / name).mkdir()
            service = BatchService(
                socket_folder / name,
                store=any_store,
                limits=FilesSettings(min_free_gb=0),
                artifacts=ArtifactSettings(url=bucket.url),
            )
            services.append(service)
            await stack.enter_async_context(service.run())
        yield services[0], services[1]


@pytest.fixture
async def clients(services: tuple[BatchService, BatchService]) -> AsyncIterator[tuple[AsyncOpenAI, AsyncOpenAI]]:
    async with services[0].official() as first, services[1].official() as second:
        yield first, second


async def uploaded(client: AsyncOpenAI, content: bytes = CONTENT, purpose: str = "fine-tune") -> str:
    return (await client.files.create(file=("a.jsonl", content), purpose=purpose)).id  # type: ignore[arg-type]


async def test_file_uploaded_through_one_gateway_can_be_read_and_deleted_through_another(
    clients: tuple[AsyncOpenAI, AsyncOpenAI], services: tuple[BatchService, BatchService], bucket: Bucket
) -> None:
    file = await uploaded(clients[0])
    assert (await clients[1].files.content(file)).content == CONTENT
    assert (await clients[1].files.delete(file)).deleted
    for service in services:
        service.files.tidy_shared()
    assert ObjectStore(bucket.url).keys("client-files") == []
    assert services[1].files.find(file) is None


async def test_file_uploaded_in_parts_through_one_gateway_can_be_read_through_another(
    clients: tuple[AsyncOpenAI, AsyncOpenAI],
) -> None:
    uploads = clients[0].uploads
    upload = await uploads.create(bytes=len(CONTENT), filename="a", mime_type="text/jsonl", purpose="fine-tune")
    part = await uploads.parts.create(upload.id, data=CONTENT)
    completed = await uploads.complete(upload.id, part_ids=[part.id])
    assert completed.file is not None
    assert (await clients[1].files.content(completed.file.id)).content == CONTENT


async def test_batch_output_written_by_one_gateway_can_be_read_through_another(
    clients: tuple[AsyncOpenAI, AsyncOpenAI], services: tuple[BatchService, BatchService]
) -> None:
    id = await create(clients[0], await uploaded(clients[0], lines(5).encode(), "batch"))
    async with services[1].running_batches():
        batch = await ended(clients[0], id)
    assert batch.output_file_id is not None
    output = (await clients[0].files.content(batch.output_file_id)).text
    assert {json.loads(line)["custom_id"] for line in output.splitlines()} == {f"r{number}" for number in range(5)}


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_batch_waits_while_the_object_store_does_not_respond(
    clients: tuple[AsyncOpenAI, AsyncOpenAI], services: tuple[BatchService, BatchService], bucket: Bucket, method: str
) -> None:
    id = await create(clients[0], await uploaded(clients[0], lines(2).encode(), "batch"))
    bucket.fail(Fault.ERROR, method, "client-files", times=6)
    async with services[1].running_batches():
        batch = await ended(clients[0], id)
    assert (batch.status, batch.request_counts and batch.request_counts.completed) == ("completed", 2)


async def test_batch_that_waits_for_the_object_store_can_be_cancelled(
    clients: tuple[AsyncOpenAI, AsyncOpenAI], services: tuple[BatchService, BatchService], bucket: Bucket
) -> None:
    id = await create(clients[0], await uploaded(clients[0], lines(2).encode(), "batch"))
    bucket.fail(Fault.ERROR, "GET", "client-files", times=1_000_000)
    async with services[1].running_batches():
        await until(lambda: len(services[1].running) == 1)
        await clients[0].batches.cancel(id)
        batch = await ended(clients[0], id)
    assert batch.status == "cancelled"


async def test_batch_fails_if_its_input_in_the_object_store_was_altered(
    clients: tuple[AsyncOpenAI, AsyncOpenAI], services: tuple[BatchService, BatchService], bucket: Bucket
) -> None:
    file = await uploaded(clients[0], lines(2).encode(), "batch")
    id = await create(clients[0], file)
    ObjectStore(bucket.url).write(f"client-files/{file}", lines(2).encode().replace(b"r1", b"r2"))
    async with services[1].running_batches():
        batch = await ended(clients[0], id)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert batch.errors.data[0].code == "input_file_unavailable"
    assert f"client-files/{file}" in (batch.errors.data[0].message or "")


async def test_gateway_can_create_and_run_a_job_without_a_local_copy_of_its_file(
    socket_folder: Path, any_store: Store, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training command is a double that copies the training data named in its recipe."""
    check = FakeCheck()
    monkeypatch.setattr("serving.server.assembly.JobCreation", partial(JobCreation, check=check))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model.safetensors").touch()
    artifacts, services = ArtifactSettings(url=bucket.url), []
    for name in ("1", "2"):
        (socket_folder / name).mkdir()
        services.append(
            FineTuningService(socket_folder / name, store=any_store, base=tmp_path / "base", artifacts=artifacts)
        )
    first, second = services
    file = first.add_file(CONTENT.decode(), status=FileStatus.UPLOADED)

    def command(recipe: Path, progress: Path) -> list[str]:
        copy = "import sys, yaml, shutil; shutil.copy(yaml.safe_load(open(sys.argv[1]))['data']['train'], sys.argv[2])"
        shell = ["sh", "-c", '"$0" -c "$1" "$2" "$3" && exec "$0" "$4" "$2" "$5"']
        copied = str(tmp_path / "trained-on")
        return [*shell, sys.executable, copy, str(recipe), copied, fake_command(recipe, progress)[1], str(progress)]

    def complete(job: Job, version: VersionId) -> JobResult:
        with second.files.writing("file-result") as (id, writer):
            writer.write(b"step,train_loss\n")
            purpose = find_file(any_store, file, None).purpose
            second.files.add(id, writer, owner=job.owner, purpose=purpose, filename="step_metrics.csv")
        return JobResult("ft:small", id)

    async with first.run(), first.official() as client:
        id = (await client.fine_tuning.jobs.create(model=BASE, training_file=file)).id
        with any_store.begin() as connection:
            connection.execute(update(FileRow).values(status="processed"))
            connection.execute(update(JobRow).values(created_at=datetime.now(UTC) - timedelta(hours=1)))
        await decide_job(any_store, second.files, second.settings, find_job(any_store, id, None), check)
        worker = JobWorker(
            any_store, second.settings, second.files, Changes(), complete=complete, command=command, pace=PACE
        )
        working = asyncio.create_task(worker.run())
        await until(lambda: find_job(any_store, id, None).status.ended, 30)
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working
        job = await client.fine_tuning.jobs.retrieve(id)
        assert (job.status, job.result_files) == (JobStatus.SUCCEEDED, ["file-result"])
        assert (await client.files.content("file-result")).text == "step,train_loss\n"
    assert (tmp_path / "trained-on").read_bytes() == CONTENT
    assert str(socket_folder / "2" / "fetched-files" / file) in check.recipes[-1]


async def test_upload_returns_503_and_leaves_no_file_while_the_object_store_is_unavailable(
    clients: tuple[AsyncOpenAI, AsyncOpenAI], services: tuple[BatchService, BatchService], bucket: Bucket
) -> None:
    bucket.fault = lambda method, path: Fault.ERROR
    with pytest.raises(openai.InternalServerError) as error:
        await uploaded(clients[0])
    assert (error.value.status_code, error.value.code) == (503, "store_unavailable")
    assert int(error.value.response.headers["retry-after"]) > 0
    assert bucket.url not in str(error.value)
    assert (await clients[0].files.list()).data == []
    assert [path.name for path in (services[0].folder / "files").iterdir() if path.stat().st_size] == []


async def test_local_file_can_be_read_and_deleted_while_the_object_store_is_unavailable(
    clients: tuple[AsyncOpenAI, AsyncOpenAI], bucket: Bucket
) -> None:
    file = await uploaded(clients[0])
    bucket.fault = lambda method, path: Fault.ERROR
    assert (await clients[0].files.content(file)).content == CONTENT
    with pytest.raises(openai.InternalServerError) as error:
        await clients[1].files.content(file)
    assert (error.value.status_code, error.value.code) == (503, "store_unavailable")
    assert (await clients[0].files.delete(file)).deleted


async def test_altered_file_content_is_not_sent(clients: tuple[AsyncOpenAI, AsyncOpenAI], bucket: Bucket) -> None:
    file = await uploaded(clients[0])
    ObjectStore(bucket.url).write(f"client-files/{file}", CONTENT.replace(b"a", b"b"))
    with pytest.raises(openai.InternalServerError, match=f"client-files/{file}") as error:
        await clients[1].files.content(file)
    assert (error.value.status_code, error.value.code) == (503, "file_content_missing")


async def test_file_is_checked_by_a_second_gateway_if_the_receiving_gateway_has_not_checked_it(
    clients: tuple[AsyncOpenAI, AsyncOpenAI],
    services: tuple[BatchService, BatchService],
    any_store: Store,
) -> None:
    file, recent = await uploaded(clients[0]), await uploaded(clients[0])
    with any_store.begin() as connection:
        past = datetime.now(UTC) - timedelta(minutes=2)
        connection.execute(update(FileRow).where(FileRow.id == file).values(created_at=past))
    checked = []

    async def check(path: Path, purpose: Purpose) -> ContentCheck:
        checked.append(path.read_bytes())
        return ContentCheck(True)

    checking = asyncio.create_task(FileChecks(any_store, services[1].files, check).run())
    await until(lambda: find_file(any_store, file, None).status is FileStatus.PROCESSED, 30)
    assert checked == [CONTENT]
    checking.cancel()
    await asyncio.wait([checking])
    assert find_file(any_store, recent, None).status is FileStatus.UPLOADED


async def test_altered_file_is_marked_unusable_by_the_file_check(
    clients: tuple[AsyncOpenAI, AsyncOpenAI],
    services: tuple[BatchService, BatchService],
    any_store: Store,
    bucket: Bucket,
) -> None:
    file = await uploaded(clients[0])
    ObjectStore(bucket.url).write(f"client-files/{file}", b"{}\n")
    with any_store.begin() as connection:
        connection.execute(update(FileRow).values(created_at=datetime.now(UTC) - timedelta(minutes=2)))
    checking = asyncio.create_task(FileChecks(any_store, services[1].files).run())
    await until(lambda: find_file(any_store, file, None).status is FileStatus.ERROR, 30)
    checking.cancel()
    await asyncio.wait([checking])
    assert f"client-files/{file}" in (find_file(any_store, file, None).status_details or "")
