"""Tests the checks of files in the background."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from serving.files import checks
from serving.files.checks import FileChecks, run_check
from serving.files.client_files import ClientFiles
from serving.files.content_check import ContentCheck
from serving.files.rows import FileStatus, Purpose, find_file
from tests.builders.client_files import EXAMPLE, batch_line
from tests.serving.control import until
from tests.serving.fine_tuning.fine_tuning_service import FineTuningService


class HeldCheck:
    """Stands for the check of a file. Each waits until it is released."""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Future[ContentCheck]] = {}

    async def __call__(self, path: Path, purpose: Purpose) -> ContentCheck:
        self.running[path.name] = asyncio.get_running_loop().create_future()
        try:
            return await self.running[path.name]
        finally:
            del self.running[path.name]

    def end(self, id: str, *, usable: bool = True, details: str | None = None) -> None:
        self.running[id].set_result(ContentCheck(usable, details))


@pytest.fixture
def files(tmp_path: Path, store: Store) -> ClientFiles:
    return ClientFiles(store, tmp_path / "files")


@pytest.fixture
def check() -> HeldCheck:
    return HeldCheck()


@asynccontextmanager
async def running(checks: FileChecks) -> AsyncIterator[FileChecks]:
    task = asyncio.create_task(checks.run())
    try:
        yield checks
    finally:
        task.cancel()
        await asyncio.wait([task])


def add(files: ClientFiles, *, owner: str = "alice", content: bytes = b"{}\n", purpose: Purpose = Purpose.BATCH) -> str:
    with files.writing() as (id, writer):
        writer.write(content)
        files.add(id, writer, owner=owner, purpose=purpose, filename="a.jsonl")
    return id


def status(store: Store, id: str) -> tuple[FileStatus, str | None]:
    file = find_file(store, id, None)
    return file.status, file.status_details


async def test_file_check_results_are_stored(store: Store, files: ClientFiles, check: HeldCheck) -> None:
    good, bad = add(files, owner="alice"), add(files, owner="bob")
    result = add(files, owner="carol", purpose=Purpose.BATCH_OUTPUT)
    async with running(FileChecks(store, files, check)):
        await until(lambda: len(check.running) == 2)
        check.end(good)
        check.end(bad, usable=False, details="line 3: wrong")
        await until(lambda: FileStatus.UPLOADED not in (status(store, good)[0], status(store, bad)[0]))
    assert status(store, good) == (FileStatus.PROCESSED, None)
    assert status(store, bad) == (FileStatus.ERROR, "line 3: wrong")
    assert status(store, result)[0] is FileStatus.UPLOADED


async def test_file_check_is_not_delayed_by_many_files_of_a_different_owner(
    store: Store, files: ClientFiles, check: HeldCheck
) -> None:
    many = [add(files, owner="alice") for _ in range(5)]
    async with running(FileChecks(store, files, check)) as checks:
        await until(lambda: list(check.running) == many[:1])
        other = add(files, owner="bob")
        checks.wake()
        await until(lambda: list(check.running) == [many[0], other])
        check.end(many[0])
        await until(lambda: list(check.running) == [other, many[1]])


async def test_file_check_interrupted_by_a_server_stop_is_rerun(
    store: Store, files: ClientFiles, check: HeldCheck
) -> None:
    id = add(files)
    async with running(FileChecks(store, files, check)):
        await until(lambda: id in check.running)
    assert not check.running
    assert status(store, id)[0] is FileStatus.UPLOADED
    async with running(FileChecks(store, files, check)):
        await until(lambda: id in check.running)
        check.end(id)
        await until(lambda: status(store, id)[0] is FileStatus.PROCESSED)


@pytest.mark.parametrize("turns", range(6))
async def test_file_checks_stop_when_cancelled_just_after_an_upload(
    store: Store, files: ClientFiles, check: HeldCheck, turns: int
) -> None:
    checks = FileChecks(store, files, check)
    task = asyncio.create_task(checks.run())
    await asyncio.sleep(0.05)
    checks.wake()
    for _ in range(turns):  # of the event loop
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=1)
    assert task.done()


async def test_file_that_is_deleted_during_its_check_stays_deleted(
    store: Store, files: ClientFiles, check: HeldCheck
) -> None:
    id, next_id = add(files), add(files)
    async with running(FileChecks(store, files, check)):
        await until(lambda: id in check.running)
        files.delete(id)
        check.end(id)
        await until(lambda: next_id in check.running)


async def test_file_without_content_is_marked_unusable_unless_another_server_may_store_its_content(
    store: Store, files: ClientFiles, check: HeldCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = add(files, owner="alice")
    files.path(lost).unlink()
    here = add(files, owner="bob")
    monkeypatch.setattr(checks, "is_sqlite", lambda store: False)
    async with running(FileChecks(store, files, check)):
        await until(lambda: list(check.running) == [here])
    assert status(store, lost)[0] is FileStatus.UPLOADED
    monkeypatch.setattr(checks, "is_sqlite", lambda store: True)
    async with running(FileChecks(store, files, check)):
        await until(lambda: status(store, lost)[0] is FileStatus.ERROR)


@pytest.mark.slow
async def test_openai_client_waits_for_the_file_check(socket_folder: Path, store: Store) -> None:
    service = FineTuningService(socket_folder, store=store, base=None)
    async with service.run(), service.official() as client, running(service.file_checks):
        good = await client.files.create(file=("a.jsonl", EXAMPLE.encode()), purpose="fine-tune")
        bad = await client.files.create(file=("a.jsonl", EXAMPLE.encode() + b"{\n"), purpose="fine-tune")
        wrong = await client.files.create(file=("b.jsonl", batch_line(method="GET")), purpose="batch")
        good, bad, wrong = [
            await client.files.wait_for_processing(each.id, poll_interval=0.1) for each in (good, bad, wrong)
        ]
    assert (good.status, good.status_details) == ("processed", None)
    assert bad.status == "error"
    assert (bad.status_details or "").startswith("line 2: invalid JSON")
    assert wrong.status_details == "line 1: method is not 'POST'"


async def test_file_check_is_killed_when_it_exceeds_its_timeout(tmp_path: Path) -> None:
    (tmp_path / "file-1").write_text(EXAMPLE)
    check = await run_check(tmp_path / "file-1", Purpose.FINE_TUNE, timeout_s=0.05)
    assert check == ContentCheck(False, "the file check did not finish within 0.05 s")


@pytest.mark.slow
async def test_failed_file_check_marks_the_file_as_unusable(tmp_path: Path) -> None:
    check = await run_check(tmp_path, Purpose.BATCH)  # a folder cannot be read
    assert check == ContentCheck(False, "the file could not be checked; the server's log says why")
