"""Tests what removes expired files and uploads, and contents that a crash has left."""

import asyncio
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import insert, update
from sqlalchemy.orm import Session

from serving.files.cleanup import run_cleanup
from serving.files.client_files import ClientFiles
from serving.files.rows import Purpose, find_file, known_files
from serving.files.shared_contents import SharedContents
from serving.files.upload_rows import Upload, UploadStatus, add_upload, find_upload
from serving.files.uploads import ClientUploads
from svc.errors import RegistryError
from svc.registry.objects import ObjectStore
from svc.store.statuses import JobStatus
from svc.store.tables import BatchRow, FileRow, JobRow, UploadRow
from tests.builders.jobs import queued_job
from tests.serving.control import until

OLD = datetime.now(UTC) - timedelta(days=2)


@pytest.fixture
def files(tmp_path: Path, store: Store) -> ClientFiles:
    return ClientFiles(store, tmp_path / "files")


@pytest.fixture
def uploads(tmp_path: Path, store: Store, files: ClientFiles) -> ClientUploads:
    return ClientUploads(store, tmp_path / "uploads", files)


def add(store: Store, files: ClientFiles, *, expired: bool = False) -> str:
    with files.writing() as (id, writer):
        writer.write(b"{}\n")
        files.add(id, writer, owner="alice", purpose=Purpose.BATCH, filename="a", expires_after_s=3600)
    if expired:
        with store.begin() as connection:
            connection.execute(update(FileRow).where(FileRow.id == id).values(expires_at=OLD))
    return id


def add_pending(store: Store, uploads: ClientUploads) -> tuple[Upload, str]:
    """Add an upload with one part."""
    now = datetime.now(UTC)
    upload = Upload(f"upload_{os.urandom(4).hex()}", "alice", Purpose.BATCH, "a", 3, now, now + timedelta(hours=1))
    add_upload(store, upload)
    with uploads.writing_part(upload) as (part, writer):
        writer.write(b"{}\n")
        uploads.add_part(upload, part, writer)
    return upload, part


def age(path: Path) -> None:
    os.utime(path, (OLD.timestamp(), OLD.timestamp()))


def test_expired_files_are_removed(store: Store, files: ClientFiles) -> None:
    kept, gone = add(store, files), add(store, files, expired=True)
    assert files.remove_expired() == 1
    assert known_files(store, [kept, gone]) == {kept}
    assert files.path(kept).is_file() and not files.path(gone).exists()


def test_expired_file_is_kept_while_a_job_or_batch_uses_it(store: Store, files: ClientFiles) -> None:
    training, validation, requests = (add(store, files, expired=True) for _ in range(3))
    counts = dict.fromkeys(("total", "completed", "failed", "tokens_in", "tokens_out"), 0)
    batch = {"id": "batch-1", "owner": "", "input_file": requests, "endpoint": "", "completion_window": "24h"}
    with Session(store) as session, session.begin():
        session.add(JobRow.of(queued_job(training_file=training, validation_file=validation)))
        session.execute(
            insert(BatchRow), [batch | counts | {"status": "validating", "created_at": OLD, "expires_at": OLD}]
        )
    assert files.remove_expired() == 0
    with store.begin() as connection:
        connection.execute(update(JobRow).values(status=JobStatus.FAILED.value))
    assert files.remove_expired() == 2
    with store.begin() as connection:
        connection.execute(update(BatchRow).values(status="expired"))
    assert files.remove_expired() == 1


def test_expired_uploads_are_removed_with_their_parts(store: Store, uploads: ClientUploads, tmp_path: Path) -> None:
    (kept, _), (gone, _) = add_pending(store, uploads), add_pending(store, uploads)
    with store.begin() as connection:
        expired = datetime.now(UTC) - timedelta(seconds=1)
        connection.execute(update(UploadRow).where(UploadRow.id == gone.id).values(expires_at=expired))
    assert uploads.remove_expired() == 1
    assert find_upload(store, gone.id, None).status is UploadStatus.EXPIRED
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == [kept.id]
    assert uploads.remove_expired() == 0
    with store.begin() as connection:
        connection.execute(update(UploadRow).where(UploadRow.id == gone.id).values(expires_at=OLD))
    uploads.remove_expired()
    with Session(store) as session:
        assert [row.id for row in session.query(UploadRow)] == [kept.id]


def test_old_files_on_disk_without_a_database_row_are_removed(store: Store, files: ClientFiles, tmp_path: Path) -> None:
    kept, folder = add(store, files), tmp_path / "files"
    for name in ("file-left", "file-new"):
        (folder / name).write_bytes(b"{}")
    for name in (kept, "file-left"):
        age(folder / name)
    with files.writing() as (written, writer):  # for hours
        writer.write(b"{}")
        age(folder / written)
        assert files.remove_unknown() == 1
        assert {path.name for path in folder.iterdir()} == {kept, "file-new", written}
        files.add(written, writer, owner="alice", purpose=Purpose.BATCH_OUTPUT, filename="a")
    assert find_file(store, written, "alice").bytes == 2


def test_no_file_contents_are_removed_if_the_store_lists_no_files(files: ClientFiles, tmp_path: Path) -> None:
    (tmp_path / "files/file-1").write_bytes(b"{}")
    age(tmp_path / "files/file-1")
    assert files.remove_unknown() == 0
    assert (tmp_path / "files/file-1").exists()


def test_upload_parts_on_disk_are_removed_when_their_upload_has_ended(
    store: Store, uploads: ClientUploads, tmp_path: Path
) -> None:
    (kept, part), folder = add_pending(store, uploads), tmp_path / "uploads"
    for name in ("upload_left", "upload_new"):
        (folder / name).mkdir()
        (folder / name / "part_1").write_bytes(b"{}")
    age(folder / "upload_left/part_1")
    age(folder / kept.id / part)
    assert uploads.remove_unknown() == 1
    assert {path.name for path in folder.iterdir()} == {kept.id, "upload_new"}
    assert (folder / kept.id / part).is_file()


async def test_file_cleanup_is_repeated_at_the_configured_interval(
    store: Store, files: ClientFiles, uploads: ClientUploads
) -> None:
    running = asyncio.create_task(run_cleanup(files, uploads, interval_s=0.05))
    for _ in range(2):
        expired = add(store, files, expired=True)
        await until(lambda id=expired: not files.path(id).exists())  # type: ignore[misc]
    running.cancel()
    await asyncio.wait([running])


async def test_object_of_a_deleted_file_is_removed_once_the_object_store_responds_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "objects").mkdir()
    objects = ObjectStore((tmp_path / "objects").as_uri())
    files = ClientFiles(store, tmp_path / "files", SharedContents(objects, tmp_path / "fetched-files"))
    files.delete(add(store, files))
    errors, delete = [RegistryError("away")], objects.delete

    def fail_once(keys: Sequence[str]) -> None:
        if errors:
            raise errors.pop()
        delete(keys)

    monkeypatch.setattr(objects, "delete", fail_once)
    cleaning = asyncio.create_task(
        run_cleanup(files, ClientUploads(store, tmp_path / "uploads", files), interval_s=0.01)
    )
    await until(lambda: not objects.keys("client-files"))
    cleaning.cancel()
    await asyncio.wait([cleaning])
    assert errors == []
