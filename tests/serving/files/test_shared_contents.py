"""Tests that contents of clients' files in an object store are either complete and correct or not used."""

import asyncio
import errno
import os
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import insert, update

from serving.files import client_files as module
from serving.files.client_files import ClientFiles
from serving.files.rows import Purpose, StorageLimitError, StorageLimits
from serving.files.shared_contents import ContentDamagedError, ContentMissingError, ContentStoreError
from serving.files.upload_rows import Upload, UploadStatus, add_upload, find_upload
from serving.files.uploads import ClientUploads
from serving.http.page import EntryNotFoundError
from svc.errors import SettingsError
from svc.registry.objects import ObjectStore
from svc.settings.client_apis import FilesSettings
from svc.settings.settings import Settings
from svc.settings.storage import ArtifactSettings
from svc.store.statuses import JobStatus
from svc.store.tables import FileRow, JobRow
from tests.builders.jobs import queued_job
from tests.new_store import new_store
from tests.object_store import Bucket, Fault

CONTENT = os.urandom(9 * 2**20 + 3)  # two parts
slow = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "home")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat failed requests once only."""
    monkeypatch.setattr(module, "ObjectStore", partial(ObjectStore, retries=1))


@pytest.fixture(params=["file", pytest.param("s3", marks=slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        return bucket.url
    (tmp_path / "shared folder").mkdir()
    return (tmp_path / "shared folder").as_uri()


def files_of(home: Path, store: Store, url: str | None) -> ClientFiles:
    settings = Settings(home=home, artifacts=ArtifactSettings(url=url), files=FilesSettings(min_free_gb=0))
    return ClientFiles.of(settings, store)


@pytest.fixture
def first(tmp_path: Path, store: Store, url: str) -> ClientFiles:
    return files_of(tmp_path / "first", store, url)


@pytest.fixture
def second(tmp_path: Path, store: Store, url: str) -> ClientFiles:
    return files_of(tmp_path / "second", store, url)


@pytest.fixture
def objects(url: str) -> ObjectStore:
    return ObjectStore(url, retries=1)


def add(files: ClientFiles, content: bytes = CONTENT, *, limits: StorageLimits | None = None) -> str:
    with files.writing() as (id, writer):
        writer.write(content)
        files.add(id, writer, owner="alice", purpose=Purpose.FINE_TUNE, filename="a.jsonl", limits=limits)
    return id


def names(home: Path) -> list[str]:
    """Return the names of the contents in a home, without marks."""
    folders = (home / "files", home / "fetched-files")
    return sorted(path.name for each in folders for path in each.glob("*") if not path.name.startswith(".removed-"))


def age(path: Path) -> None:
    """Make a file look as if it was last used two days ago."""
    past = time.time() - 2 * 86_400
    os.utime(path, (past, past))


def add_job(store: Store, file: str, status: JobStatus = JobStatus.QUEUED) -> None:
    with store.begin() as connection:
        connection.execute(insert(JobRow), asdict(queued_job(training_file=file)) | {"status": status.value})


@pytest.mark.slow
async def test_file_content_fetched_by_another_server_equals_the_upload(
    first: ClientFiles, second: ClientFiles
) -> None:
    assert (await second.content(add(first))).read_bytes() == CONTENT


@pytest.mark.slow
async def test_fetched_file_content_is_not_fetched_again(
    first: ClientFiles, second: ClientFiles, objects: ObjectStore
) -> None:
    id = add(first)
    path = await second.content(id)
    objects.delete([f"client-files/{id}"])
    assert await second.content(id) == path


async def test_file_content_on_the_local_disk_is_not_fetched(first: ClientFiles, objects: ObjectStore) -> None:
    id = add(first)
    objects.delete([f"client-files/{id}"])
    assert await first.content(id) == first.path(id)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])], ids=["truncated", "bit"])
async def test_error_for_a_damaged_object_names_its_key_and_no_file_is_left_behind(
    first: ClientFiles, second: ClientFiles, objects: ObjectStore, tmp_path: Path, damaged: bytes
) -> None:
    id = add(first)
    objects.write(f"client-files/{id}", damaged)
    with pytest.raises(ContentDamagedError, match=f"client-files/{id}") as error:
        await second.content(id)
    assert objects.url not in str(error.value)
    assert names(tmp_path / "second") == []


async def test_fetching_content_absent_from_the_object_store_raises_missing_content_error(
    first: ClientFiles, second: ClientFiles, objects: ObjectStore
) -> None:
    id = add(first)
    objects.delete([f"client-files/{id}"])
    with pytest.raises(ContentMissingError, match="not in the server's object store"):
        await second.content(id)


async def test_missing_content_error_names_the_setting_if_no_object_store_is_configured(
    tmp_path: Path, store: Store
) -> None:
    id = add(files_of(tmp_path / "first", store, None))
    with pytest.raises(ContentMissingError, match=r"artifacts\.url"):
        await files_of(tmp_path / "second", store, None).content(id)


@pytest.mark.slow
async def test_content_of_a_deleted_file_is_not_found(first: ClientFiles, second: ClientFiles) -> None:
    id = add(first)
    first.delete(id)
    with pytest.raises(EntryNotFoundError):
        await second.content(id)


@slow
async def test_file_content_requested_by_concurrent_readers_is_fetched_once(
    tmp_path: Path, store: Store, bucket: Bucket
) -> None:
    first, second = (files_of(tmp_path / name, store, bucket.url) for name in ("first", "second"))
    id = add(first)
    bucket.requests.clear()
    assert len(set(await asyncio.gather(*(second.content(id) for _ in range(10))))) == 1
    assert len([path for method, path in bucket.requests if method == "GET"]) == 2  # one for each part


@pytest.mark.slow
async def test_processes_that_share_a_home_can_fetch_the_same_content_concurrently(
    first: ClientFiles, tmp_path: Path, store: Store, url: str
) -> None:
    id = add(first)
    processes = [files_of(tmp_path / "second", store, url) for _ in range(4)]
    paths = await asyncio.gather(*(each.content(id) for each in processes))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert names(tmp_path / "second") == [id]


@slow
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.CUT, Fault.LOST])
async def test_interrupted_fetch_leaves_no_partial_file_content(
    tmp_path: Path, store: Store, bucket: Bucket, fault: Fault
) -> None:
    first, second = (files_of(tmp_path / name, store, bucket.url) for name in ("first", "second"))
    id = add(first)
    bucket.fail(fault, "GET", id, times=100)
    with pytest.raises(ContentStoreError):
        await second.content(id)
    assert (names(tmp_path / "second"), second.find(id)) == ([], None)
    bucket.fail(fault, "GET", id, times=0)
    assert (await second.content(id)).read_bytes() == CONTENT


@pytest.mark.slow
async def test_cancelling_one_waiting_reader_does_not_cancel_the_fetch_for_others(
    first: ClientFiles, second: ClientFiles
) -> None:
    id = add(first)
    waiting = [asyncio.create_task(second.content(id)) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert (await waiting[1]).read_bytes() == CONTENT


@pytest.mark.slow
async def test_content_that_does_not_fit_on_the_disk_is_not_fetched(
    first: ClientFiles, second: ClientFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = add(first)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=len(CONTENT) - 1))
    with pytest.raises(OSError, match="disk space") as error:
        await second.content(id)
    assert error.value.errno == errno.ENOSPC


@slow
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.LOST])
async def test_file_is_not_added_if_the_object_store_does_not_respond(
    tmp_path: Path, store: Store, bucket: Bucket, fault: Fault
) -> None:
    files = files_of(tmp_path, store, bucket.url)
    bucket.fault = lambda method, path: fault if method in ("PUT", "POST") else None
    with pytest.raises(ContentStoreError) as error:
        add(files, b"{}\n")
    assert bucket.url not in str(error.value)
    assert names(tmp_path) == []
    bucket.fault = lambda method, path: None
    files.tidy_shared()
    assert ObjectStore(bucket.url).keys("client-files") == []


def test_object_of_a_file_that_could_not_be_added_is_deleted(first: ClientFiles, objects: ObjectStore) -> None:
    with pytest.raises(StorageLimitError):
        add(first, b"{}\n", limits=StorageLimits(bytes=10, files=0))
    first.tidy_shared()
    assert objects.keys("client-files") == []


def test_completed_upload_is_in_the_object_store(
    first: ClientFiles, tmp_path: Path, store: Store, objects: ObjectStore
) -> None:
    uploads, now = ClientUploads(store, tmp_path / "uploads", first), datetime.now(UTC)
    upload = Upload("upload_1", "alice", Purpose.BATCH, "a", 3, now, now + timedelta(hours=1))
    add_upload(store, upload)
    with uploads.writing_part(upload) as (part, writer):
        writer.write(b"{}\n")
        uploads.add_part(upload, part, writer)
    limits = StorageLimits(bytes=100, files=10)
    _, file = uploads.complete(upload, [part], md5=None, limits=limits, on_write=lambda size: None)
    assert objects.read(f"client-files/{file.id}") == b"{}\n"


@slow
def test_upload_stays_pending_if_the_object_store_does_not_respond(
    tmp_path: Path, store: Store, bucket: Bucket
) -> None:
    files = files_of(tmp_path, store, bucket.url)
    uploads, now = ClientUploads(store, tmp_path / "uploads", files), datetime.now(UTC)
    upload = Upload("upload_1", "alice", Purpose.BATCH, "a", 3, now, now + timedelta(hours=1))
    add_upload(store, upload)
    with uploads.writing_part(upload) as (part, writer):
        writer.write(b"{}\n")
        uploads.add_part(upload, part, writer)
    bucket.fail(Fault.ERROR, "PUT", "client-files", times=2)
    complete = partial(uploads.complete, upload, [part], md5=None, on_write=lambda size: None)
    with pytest.raises(ContentStoreError):
        complete(limits=StorageLimits(bytes=100, files=10))
    assert find_upload(store, "upload_1", None).status is UploadStatus.PENDING
    assert complete(limits=StorageLimits(bytes=100, files=10))[0].status is UploadStatus.COMPLETED


def test_object_is_deleted_whichever_server_deletes_its_file(
    first: ClientFiles, second: ClientFiles, objects: ObjectStore
) -> None:
    id = add(first, b"{}\n")
    second.delete(id)
    second.tidy_shared()
    assert objects.keys("client-files") == []


def test_object_of_an_expired_file_is_deleted(first: ClientFiles, store: Store, objects: ObjectStore) -> None:
    id = add(first, b"{}\n")
    with store.begin() as connection:
        connection.execute(update(FileRow).where(FileRow.id == id).values(expires_at=datetime.now(UTC)))
    assert first.remove_expired() == 1
    first.tidy_shared()
    assert objects.keys("client-files") == []


@slow
def test_object_of_a_deleted_file_is_deleted_once_the_object_store_responds(
    tmp_path: Path, store: Store, bucket: Bucket
) -> None:
    files = files_of(tmp_path, store, bucket.url)
    id = add(files, b"{}\n")
    bucket.fault = lambda method, path: Fault.ERROR
    files.delete(id)
    with pytest.raises(ContentStoreError):
        files.tidy_shared()
    bucket.fault = lambda method, path: None
    files.tidy_shared()
    assert ObjectStore(bucket.url).keys("client-files") == []


def test_object_marked_for_deletion_is_kept_if_its_file_exists(first: ClientFiles, objects: ObjectStore) -> None:
    id = add(first, b"{}\n")
    first.path(f".removed-{id}").touch()
    first.tidy_shared()
    assert objects.keys("client-files") == [f"client-files/{id}"]


def test_object_left_by_a_crash_is_deleted(first: ClientFiles, objects: ObjectStore) -> None:
    id = add(first, b"{}\n")
    objects.write("client-files/file-crashed", b"{}\n")
    first.path("file-crashed").write_bytes(b"{}\n")
    age(first.path("file-crashed"))
    assert first.remove_unknown() == 1
    first.tidy_shared()
    assert objects.keys("client-files") == [f"client-files/{id}"]


@pytest.mark.slow
async def test_local_copy_of_a_deleted_file_is_removed(first: ClientFiles, second: ClientFiles, tmp_path: Path) -> None:
    id, other = add(first), add(first)
    for each in (id, other):
        await second.content(each)
    first.delete(id)
    second.tidy_shared()
    assert names(tmp_path / "second") == [other]


@pytest.mark.slow
@pytest.mark.parametrize("needed", [True, False])
async def test_local_copy_not_used_recently_is_removed_unless_a_running_job_needs_the_file(
    first: ClientFiles, second: ClientFiles, store: Store, tmp_path: Path, needed: bool
) -> None:
    id = add(first)
    age(await second.content(id))
    add_job(store, id, JobStatus.RUNNING if needed else JobStatus.SUCCEEDED)
    second.tidy_shared()
    assert names(tmp_path / "second") == ([id] if needed else [])


@pytest.mark.slow
async def test_recently_used_local_copy_of_a_file_is_kept(
    first: ClientFiles, second: ClientFiles, tmp_path: Path
) -> None:
    id = add(first)
    age(await second.content(id))
    await second.content(id)
    second.tidy_shared()
    assert names(tmp_path / "second") == [id]


@pytest.mark.slow
async def test_file_added_before_the_object_store_was_configured_is_uploaded(
    tmp_path: Path, store: Store, url: str, second: ClientFiles
) -> None:
    id = add(files_of(tmp_path / "first", store, None))
    files = files_of(tmp_path / "first", store, url)
    assert (files.share_missing(), files.share_missing()) == (1, 0)
    assert (await second.content(id)).read_bytes() == CONTENT


def test_damaged_local_file_does_not_prevent_other_files_from_being_uploaded(
    tmp_path: Path, store: Store, url: str, objects: ObjectStore
) -> None:
    old = files_of(tmp_path / "first", store, None)
    damaged, good = add(old, b"first\n"), add(old, b"second\n")
    old.path(damaged).write_bytes(b"other\n")
    assert files_of(tmp_path / "first", store, url).share_missing() == 1
    assert objects.keys("client-files") == [f"client-files/{good}"]


@pytest.mark.slow
async def test_unused_local_copies_are_removed_whichever_database_is_configured(
    any_store: Store, tmp_path: Path
) -> None:
    (tmp_path / "objects").mkdir()
    first, second = (files_of(tmp_path / name, any_store, (tmp_path / "objects").as_uri()) for name in ("a", "b"))
    needed, unneeded = add(first, b"{}\n"), add(first, b"{}\n")
    for id in (needed, unneeded):
        age(await second.content(id))
    add_job(any_store, needed)
    second.tidy_shared()
    assert (names(tmp_path / "b"), second.find(unneeded)) == ([needed], None)


def test_missing_object_store_package_is_reported_before_the_server_starts(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    settings = Settings.model_validate({"home": tmp_path, "artifacts": {"url": tmp_path.as_uri()}})
    with pytest.raises(SettingsError, match="obstore is not installed"):
        ClientFiles.of(settings, store)
