"""Tests that versions in an object store are either complete and correct or absent, in folders and in S3."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import obstore
import pytest

from svc.errors import DiskSpaceError, IntegrityError, NotFoundError, RegistryError, SettingsError
from svc.registry import objects as module
from svc.registry.files import FileRecord, record_files
from svc.registry.manifest import BaseRecord, Manifest, manifest_bytes
from svc.registry.objects import ObjectStore
from svc.registry.registry import HELDOUT_FILE
from svc.version import Format, VersionId
from tests.object_store import Bucket, Fault
from tests.svc.registry.manifests import make_manifest

WEIGHTS = 9 * 2**20 + 3  # two parts
FILE = "merged/model.safetensors"
slow = pytest.mark.slow


@pytest.fixture(params=["file", pytest.param("s3", marks=slow)])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        return ObjectStore(request.getfixturevalue("bucket").url, retries=3)
    folder = tmp_path / "shared folder"
    folder.mkdir()
    return ObjectStore(folder.as_uri())


@pytest.fixture
def s3(bucket: Bucket) -> ObjectStore:
    return ObjectStore(bucket.url, retries=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the files of a version."""
    folder = tmp_path / "source"
    (folder / "merged").mkdir(parents=True)
    (folder / "gptq").mkdir()
    (folder / FILE).write_bytes(os.urandom(WEIGHTS))
    for format in ("merged", "gptq"):
        (folder / format / "tokenizer.json").write_bytes(b"{}")
        (folder / format / "empty.txt").touch()
    (folder / HELDOUT_FILE).write_bytes(b"a line\n")
    return folder


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return make_manifest(VersionId("name", 3), folder)


def weights(manifest: Manifest) -> FileRecord:
    """Return the record of the version's weights."""
    return next(file for file in manifest.files if file.path == FILE)


def key_of(manifest: Manifest, file: FileRecord) -> str:
    return f"files/{manifest.name}/{file.sha256}/{Path(file.path).name}"


def keys(objects: ObjectStore) -> list[str]:
    return sorted(entry["path"] for page in obstore.list(objects._client) for entry in page)


@pytest.mark.slow
def test_downloaded_version_equals_the_uploaded_version(
    objects: ObjectStore, manifest: Manifest, folder: Path, tmp_path: Path
) -> None:
    objects.upload(manifest, folder)
    found = objects.manifest(manifest.id)
    objects.download(found.name, found.files, tmp_path / "copy", str(found.id))
    assert found == manifest
    assert record_files(tmp_path / "copy", tmp_path / "copy") == record_files(folder, folder)


@pytest.mark.slow
def test_uploaded_versions_are_listed(objects: ObjectStore, manifest: Manifest, folder: Path) -> None:
    assert objects.versions() == []
    for name, number in (("other", 1), ("name", 12), ("name", 3)):
        objects.upload(manifest.model_copy(update={"name": name, "number": number}), folder)
    obstore.put(objects._client, "manifests/name/notes.txt", b"")
    assert objects.versions("name") == [VersionId("name", 3), VersionId("name", 12)]
    assert objects.versions() == [VersionId("name", 3), VersionId("name", 12), VersionId("other", 1)]


@pytest.mark.slow
def test_identical_files_are_uploaded_once(objects: ObjectStore, manifest: Manifest, folder: Path) -> None:
    objects.upload(manifest, folder)
    assert len([key for key in keys(objects) if key.endswith("/tokenizer.json")]) == 1


@pytest.mark.slow
def test_upload_creates_no_objects_other_than_version_files_and_a_manifest(
    objects: ObjectStore, manifest: Manifest, folder: Path
) -> None:
    objects.upload(manifest, folder)
    assert {key.split("/")[0] for key in keys(objects)} == {"files", "manifests"}


def test_version_absent_from_the_object_store_raises_not_found(objects: ObjectStore) -> None:
    with pytest.raises(NotFoundError, match="no version name@9"):
        objects.manifest(VersionId("name", 9))


def test_upload_of_a_modified_file_is_refused_and_publishes_nothing(
    objects: ObjectStore, manifest: Manifest, folder: Path
) -> None:
    with (folder / FILE).open("r+b") as file:
        file.write(b"other")
    with pytest.raises(IntegrityError, match=r"model\.safetensors was changed"):
        objects.upload(manifest, folder)
    assert objects.versions() == []
    assert key_of(manifest, weights(manifest)) not in keys(objects)


def test_upload_is_refused_if_a_version_file_is_missing_locally(
    objects: ObjectStore, manifest: Manifest, folder: Path
) -> None:
    (folder / FILE).unlink()
    with pytest.raises(IntegrityError, match=r"model\.safetensors is missing"):
        objects.upload(manifest, folder)
    assert objects.versions() == []


def test_registering_an_existing_version_number_with_different_content_is_refused(
    objects: ObjectStore, manifest: Manifest, folder: Path
) -> None:
    objects.upload(manifest, folder)
    other = manifest.model_copy(update={"base": BaseRecord(origin="other", revision="1", licence=None)})
    with pytest.raises(RegistryError, match="name@3 is already in") as caught:
        objects.upload(other, folder)
    assert "svc train" in caught.value.todo
    assert objects.manifest(manifest.id) == manifest


@pytest.mark.slow
def test_racing_registrations_publish_exactly_one_version(
    objects: ObjectStore, manifest: Manifest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = manifest.model_copy(update={"run": "another"})
    rival = ObjectStore(objects.url)
    send = ObjectStore._publish

    def publish_second(self: ObjectStore, of: Manifest) -> None:
        monkeypatch.setattr(ObjectStore, "_publish", send)
        rival.upload(other, folder)  # while the first one has sent its files but not its manifest
        send(self, of)

    monkeypatch.setattr(ObjectStore, "_publish", publish_second)
    with pytest.raises(RegistryError, match="already in"):
        objects.upload(manifest, folder)
    assert objects.manifest(manifest.id) == other
    assert objects.lacks(other.name, other.files) == []


@pytest.mark.slow
def test_repeated_upload_of_a_version_succeeds(objects: ObjectStore, manifest: Manifest, folder: Path) -> None:
    objects.upload(manifest, folder)
    objects.upload(manifest, folder)
    assert objects.manifest(manifest.id) == manifest


@slow
def test_repeated_upload_sends_only_files_absent_from_the_object_store(
    s3: ObjectStore, bucket: Bucket, manifest: Manifest, folder: Path
) -> None:
    s3.upload(manifest, folder)
    sent = weights(manifest)
    obstore.delete(s3._client, f"manifests/{manifest.name}/{manifest.number}.json")
    obstore.delete(s3._client, key_of(manifest, manifest.heldout))
    bucket.requests.clear()
    s3.upload(manifest, folder)
    written = [path for method, path in bucket.requests if method in ("PUT", "POST") and "/files/" in path]
    assert len(written) == 1 and HELDOUT_FILE in written[0]
    assert s3.lacks(manifest.name, [sent]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "how"),
    [
        (None, "is missing"),
        (b"short", "has 5 bytes"),
        (bytes(WEIGHTS), "was altered"),
    ],
)
def test_error_for_a_corrupt_object_names_its_key(
    objects: ObjectStore, manifest: Manifest, folder: Path, tmp_path: Path, content: bytes | None, how: str
) -> None:
    objects.upload(manifest, folder)
    key = key_of(manifest, weights(manifest))
    if content is None:
        obstore.delete(objects._client, key)
    else:
        obstore.put(objects._client, key, content)
    with pytest.raises(IntegrityError, match=how) as caught:
        objects.download(manifest.name, manifest.files, tmp_path / "copy", str(manifest.id))
    assert key in caught.value.wrong and FILE in caught.value.wrong
    assert list((tmp_path / "copy" / "merged").glob("*model*")) == []
    assert list((tmp_path / "copy" / "merged").glob(".*")) == []


def test_truncated_object_is_uploaded_again(objects: ObjectStore, manifest: Manifest, folder: Path) -> None:
    objects.upload(manifest, folder)
    obstore.put(objects._client, key_of(manifest, weights(manifest)), b"short")
    objects.upload(manifest, folder)
    assert objects.lacks(manifest.name, manifest.files) == []


@pytest.mark.slow
def test_interrupted_download_resumes_with_the_files_not_yet_downloaded(
    objects: ObjectStore, manifest: Manifest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.upload(manifest, folder)
    received: list[str] = []
    receive = ObjectStore.receive_file

    def once(self: ObjectStore, key: str, file: FileRecord, path: Path, on_bytes: Callable[[int], None]) -> None:
        if len(received) == 2:
            received.append("interrupted")
            raise KeyboardInterrupt
        received.append(file.path)
        receive(self, key, file, path, on_bytes)

    monkeypatch.setattr(ObjectStore, "receive_file", once)
    with pytest.raises(KeyboardInterrupt):
        objects.download(manifest.name, manifest.files, tmp_path / "copy", str(manifest.id))
    objects.download(manifest.name, manifest.files, tmp_path / "copy", str(manifest.id))
    assert sorted(received) == sorted([*(file.path for file in manifest.files), "interrupted"])


@pytest.mark.parametrize("path", ["../outside", "/etc/outside", "merged/../../outside"])
def test_manifest_with_a_path_outside_its_folder_is_refused(
    objects: ObjectStore, manifest: Manifest, path: str
) -> None:
    evil = manifest.model_copy(update={"heldout": manifest.heldout.model_copy(update={"path": path})})
    obstore.put(objects._client, "manifests/name/3.json", manifest_bytes(evil))
    with pytest.raises(IntegrityError, match="outside the version's folder"):
        objects.manifest(manifest.id)


@pytest.mark.parametrize(
    ("content", "why"), [(b"{", "is not a manifest"), (b"{}", "is not a manifest"), (None, "is the manifest of name@3")]
)
def test_error_for_a_corrupt_manifest_object_names_its_key(
    objects: ObjectStore, manifest: Manifest, content: bytes | None, why: str
) -> None:
    obstore.put(objects._client, "manifests/name/4.json", content or manifest_bytes(manifest))
    with pytest.raises(IntegrityError, match=rf"manifests/name/4\.json {why}"):
        objects.manifest(VersionId("name", 4))


@pytest.mark.slow
def test_download_is_refused_when_there_is_not_enough_disk_space(
    objects: ObjectStore, manifest: Manifest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.upload(manifest, folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskSpaceError, match="9 MB, and 0 MB are free"):
        objects.download(manifest.name, manifest.files, tmp_path / "copy", str(manifest.id))


def test_error_is_raised_if_the_object_store_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot open the object store file:"):
        ObjectStore((tmp_path / "nowhere").as_uri()).versions()


def test_missing_obstore_package_raises_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(SettingsError, match="obstore is not installed"):
        _ = ObjectStore("s3://bucket")._client


@slow
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.LOST, Fault.STALL])
@pytest.mark.parametrize("part", ["partNumber=2", "/manifests/", "/probes/", "uploads", "/tokenizer.json"])
def test_upload_succeeds_after_transient_request_failures(
    bucket: Bucket, manifest: Manifest, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, part: str
) -> None:
    if fault is Fault.STALL:
        monkeypatch.setattr(module, "_REQUEST_TIMEOUT", timedelta(seconds=2))
    s3 = ObjectStore(bucket.url, retries=3)
    bucket.fail(fault, "POST" if part == "uploads" else "PUT", part)
    s3.upload(manifest, folder)
    assert s3.manifest(manifest.id) == manifest
    assert s3.lacks(manifest.name, manifest.files) == []


@slow
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.LOST, Fault.CUT, Fault.STALL])
def test_download_succeeds_after_transient_request_failures(
    bucket: Bucket, manifest: Manifest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    ObjectStore(bucket.url).upload(manifest, folder)
    if fault is Fault.STALL:
        monkeypatch.setattr(module, "_REQUEST_TIMEOUT", timedelta(seconds=2))
    s3 = ObjectStore(bucket.url, retries=3)
    bucket.fail(fault, "GET", "/model.safetensors", times=2)
    s3.download(manifest.name, manifest.files, tmp_path / "copy", str(manifest.id))
    assert record_files(tmp_path / "copy", tmp_path / "copy") == record_files(folder, folder)


@slow
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.LOST])
def test_persistently_failing_upload_publishes_nothing_and_its_error_names_the_object_key(
    s3: ObjectStore, bucket: Bucket, manifest: Manifest, folder: Path, fault: Fault
) -> None:
    key = key_of(manifest, weights(manifest))
    bucket.fail(fault, "PUT", "/model.safetensors", times=1000)
    with pytest.raises(RegistryError, match=f"could not write {key}") as caught:
        s3.upload(manifest, folder)
    bucket.fail(fault, "", "", times=0)
    assert s3.versions() == []
    assert key not in keys(s3)
    assert "test-secret" not in str(caught.value) and "Signature" not in str(caught.value)
    s3.upload(manifest, folder)
    assert s3.versions() == [manifest.id]


@slow
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.CUT])
def test_persistently_failing_download_leaves_no_file_and_its_error_names_the_object_key(
    s3: ObjectStore, bucket: Bucket, manifest: Manifest, folder: Path, tmp_path: Path, fault: Fault
) -> None:
    s3.upload(manifest, folder)
    bucket.fail(fault, "GET", "/model.safetensors", times=1000)
    with pytest.raises(RegistryError, match=f"could not read {key_of(manifest, weights(manifest))}"):
        s3.download(manifest.name, manifest.files, tmp_path / "copy", str(manifest.id))
    assert list((tmp_path / "copy").rglob("*model*")) == []


@slow
def test_object_store_that_ignores_conditional_writes_is_rejected_before_any_upload(
    s3: ObjectStore, bucket: Bucket, manifest: Manifest, folder: Path
) -> None:
    bucket.fault = lambda method, path: Fault.UNCONDITIONAL
    with pytest.raises(RegistryError, match="ignores write conditions"):
        s3.upload(manifest, folder)
    assert keys(s3) == []


@slow
@pytest.mark.usefixtures("bucket")
def test_missing_bucket_error_contains_the_error_code_of_the_object_store(manifest: Manifest, folder: Path) -> None:
    with pytest.raises(RegistryError, match="NoSuchBucket") as caught:
        ObjectStore("s3://no-such-bucket", retries=1).upload(manifest, folder)
    assert "HostId" not in caught.value.wrong


@slow
def test_unreachable_object_store_is_reported_within_seconds(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(RegistryError, match=f"{bucket.url} could not list manifests"):
        ObjectStore(bucket.url, retries=2).versions()
    assert time.monotonic() - started < 10


@pytest.mark.slow
@pytest.mark.parametrize("format", [Format.MERGED, Format.GPTQ])
def test_only_the_requested_files_are_downloaded(
    objects: ObjectStore, manifest: Manifest, folder: Path, tmp_path: Path, format: Format
) -> None:
    objects.upload(manifest, folder)
    objects.download(manifest.name, manifest.formats[format].files, tmp_path / "copy", str(manifest.id))
    assert [path.name for path in (tmp_path / "copy").iterdir()] == [format.value]
