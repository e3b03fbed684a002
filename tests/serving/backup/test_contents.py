"""Tests that the contents of clients' files are in a snapshot, each once, and are restored for their owner only."""

import stat
from pathlib import Path

import pytest

from serving.backup.archive import Archive
from serving.backup.backup import Backup
from serving.files.client_files import ClientFiles
from serving.files.rows import Purpose, remove_file
from svc.settings.storage import ArtifactSettings
from tests.serving.backup.conftest import BackUp, RestoreAs, UsedHome


@pytest.fixture
def files(used: UsedHome) -> ClientFiles:
    return ClientFiles(used.store, used.settings.home / "files")


def add(files: ClientFiles, content: bytes) -> str:
    with files.writing() as (id, writer):
        writer.write(content)
        files.add(id, writer, owner="alice", purpose=Purpose.BATCH, filename="a.jsonl")
    return id


def names(archive: Archive) -> list[str]:
    return [path.name for path in archive.contents.iterdir()]


@pytest.mark.slow
def test_identical_file_contents_are_backed_up_once_and_restored_with_owner_only_permissions(
    files: ClientFiles, archive: Archive, back_up: BackUp, restore_as: RestoreAs
) -> None:
    ids = [add(files, b"same"), add(files, b"same"), add(files, b"other")]
    back_up()
    back_up()
    assert len(names(archive)) == 2
    folder = restore_as("again").home / "files"
    assert [(folder / id).read_bytes() for id in ids] == [b"same", b"same", b"other"]
    assert {stat.S_IMODE((folder / id).stat().st_mode) for id in ids} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_file_content_is_pruned_when_no_snapshot_needs_it(files: ClientFiles, used: UsedHome, archive: Archive) -> None:
    gone = add(files, b"gone")
    add(files, b"stays")
    Backup(used.settings, archive).run(keep=1)
    files.delete(gone)
    Backup(used.settings, archive).run(keep=2)
    assert len(names(archive)) == 2
    Backup(used.settings, archive).run(keep=1)
    assert len(names(archive)) == 1


@pytest.mark.slow
def test_damaged_and_missing_file_contents_are_named_and_the_rest_is_backed_up(
    files: ClientFiles, used: UsedHome, archive: Archive, back_up: BackUp
) -> None:
    damaged, missing, _ = add(files, b"damaged"), add(files, b"missing"), add(files, b"good")
    files.path(damaged).write_bytes(b"DAMAGED")
    files.path(missing).unlink()
    left_out = back_up().snapshot.left_out
    assert left_out.keys() == {damaged, missing}
    assert len(names(archive)) == 1
    remove_file(used.store, missing)
    assert back_up().snapshot.left_out.keys() == {damaged}


def test_file_content_that_is_only_in_the_object_store_is_not_reported_as_missing(
    files: ClientFiles, used: UsedHome, archive: Archive, tmp_path: Path
) -> None:
    elsewhere, _ = add(files, b"elsewhere"), add(files, b"here")
    files.path(elsewhere).unlink()
    settings = used.settings.model_copy(update={"artifacts": ArtifactSettings(url=tmp_path.as_uri())})
    assert Backup(settings, archive).run(keep=1).snapshot.left_out == {}
    assert len(names(archive)) == 1


@pytest.mark.slow
def test_damaged_file_content_in_a_backup_is_not_restored_until_a_verifying_backup_replaces_it(
    files: ClientFiles, archive: Archive, back_up: BackUp, restore_as: RestoreAs
) -> None:
    id = add(files, b"content")
    back_up()
    copy: Path = next(archive.contents.iterdir())
    copy.write_bytes(b"CONTENT")
    assert not (restore_as("first").home / "files" / id).exists()
    back_up(verify=True)
    assert (restore_as("second").home / "files" / id).read_bytes() == b"content"
