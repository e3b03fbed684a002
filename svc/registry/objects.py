"""Stores versions in an object store that several machines share: S3, Google Cloud, Azure, or a shared folder.

    manifests/NAME/N.json      written last, and never replaced; a version exists only if it has a manifest
    files/NAME/SHA256/FILE     one file of the model's versions, keyed by its hash
    checkpoints/RUN/STEP/FILE  one file of a checkpoint of an unfinished training run
    client-files/ID            the contents of a client's file, see serving.files.shared_contents

Because a key contains the file's hash, two machines never write different contents under one key. An interrupted upload
continues with the first missing file. In every supported store, objects appear only when they are complete.

Downloads are read in ranges of a few MB, each of which the client retries separately. Every file is hashed while it is
copied, so corruption is detected even if a store neither checks nor returns checksums.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from svc.errors import DiskSpaceError, IntegrityError, NotFoundError, RegistryError, SettingsError
from svc.registry.files import FileRecord
from svc.registry.manifest import Manifest, manifest_bytes, parse_manifest
from svc.version import NAME_PATTERN, NUMBER_PATTERN, Format, VersionId

if TYPE_CHECKING:
    from obstore import Bytes
    from obstore.store import ObjectStore as Client

_PART = 2**23  # bytes
_AT_ONCE = 4
_MAX_PARTS = 9_000  # S3 allows 10,000
_REQUEST_TIMEOUT = timedelta(minutes=2)
_CONNECT_TIMEOUT = timedelta(seconds=5)
_RETRY_TIMEOUT = timedelta(minutes=3)
_RETRIES = 8  # the last one half a minute after the first failure
_CREATE_PAUSES_S = (0.2, 1.0, 5.0)
_FIRST_PROGRESS_S, _PROGRESS_S = 2.0, 15.0
_MANIFESTS, _FILES, _PROBES = "manifests", "files", "probes"
_HIDDEN = (re.compile(r"<(?!Code>|/Code>)[^>]*>[^<]*"), re.compile(r"\?\S+"))
"""Patterns for the parts of an error message to hide: all elements of an XML error except its code, and a URL's query
parameters, which may contain a signature."""
OnBytes = Callable[[int], None]
CopyFile = Callable[[str, FileRecord, Path, OnBytes], None]
"""Type of `ObjectStore.send_file` and `ObjectStore.receive_file`."""


@dataclass
class ObjectStore:
    """All versions in one object store, under one prefix.

    Attributes:
        url: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` or `file:///path`.
        retries: maximum number of retries of a failed request, with increasing pauses.
    """

    url: str
    retries: int = _RETRIES

    def versions_url(self, name: str) -> str:
        """Return the URL under which the manifests of a model's versions are stored."""
        return f"{self.url.rstrip('/')}/{_MANIFESTS}/{name}"

    @cached_property
    def _client(self) -> "Client":
        require_obstore()
        from obstore.exceptions import BaseError
        from obstore.store import LocalStore, from_url

        try:
            if self.url.startswith("file:"):
                return LocalStore(Path(unquote(urlsplit(self.url).path)))
            return from_url(
                self.url,
                client_options={
                    "timeout": _REQUEST_TIMEOUT,
                    "connect_timeout": _CONNECT_TIMEOUT,
                    "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"),  # else not read
                },
                retry_config={"max_retries": self.retries, "retry_timeout": _RETRY_TIMEOUT},
            )
        except BaseError as error:
            raise RegistryError(
                f"cannot open the object store {self.url}: {_reason(error)}",
                expected="a mounted folder, or a bucket with credentials in the environment",
                todo="check artifacts.url, and the variables in docs/scale.md#object-storage",
            ) from None

    def versions(self, name: str | None = None) -> list[VersionId]:
        """Return the versions of one model or of all models in the store, sorted by name and number.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        keys = self.keys(f"{_MANIFESTS}/{name}" if name else _MANIFESTS)
        named = [re.fullmatch(rf"{_MANIFESTS}/([^/]+)/({NUMBER_PATTERN})\.json", key) for key in keys]
        versions = [VersionId(found[1], int(found[2])) for found in named if found]
        return sorted(version for version in versions if re.fullmatch(NAME_PATTERN, version.name))

    def manifest(self, version: VersionId) -> Manifest:
        """Return a version's manifest.

        Raises:
            NotFoundError: the store has no such version.
            IntegrityError: the object is not this version's manifest.
            RegistryError: the store is not responding, or rejects the request.
        """
        key = manifest_key(version)
        content = self.read(key)
        if content is None:
            raise NotFoundError(f"there is no version {version} in {self.url}", todo="list the versions: svc models")
        return parse_manifest(content, version, f"{self.url}/{key}")

    def has(self, manifest: Manifest, format: Format) -> bool:
        """Return whether the store has this version's manifest and complete copies of all files of one format.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        content = self.read(manifest_key(manifest.id))
        if content is None or json.loads(content) != json.loads(manifest_bytes(manifest)):
            return False
        return not self.lacks(manifest.name, manifest.formats[format].files)

    def lacks(self, name: str, records: Iterable[FileRecord]) -> list[FileRecord]:
        """Return the records of the files that the store lacks or contains only in part.

        Args:
            name: the model's name.
            records: files of the model's versions.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        return [file for file in records if self.size(_file_key(name, file)) != file.bytes]

    def upload(self, manifest: Manifest, folder: Path) -> None:
        """Upload a version: first the files that the store lacks, then the manifest, which publishes it.

        Args:
            folder: folder with the version's files.

        Raises:
            IntegrityError: a file differs from the manifest.
            RegistryError: the store is not responding, rejects a request, or ignores conditional writes; or it has a
                different version with this name and number.
        """
        self._require_conditions()
        self.upload_files(manifest.name, manifest.files, folder, str(manifest.id))
        self._publish(manifest)

    def upload_files(self, name: str, records: Iterable[FileRecord], folder: Path, what: str) -> None:
        """Upload a version's files that the store lacks. The version need not be published yet.

        Args:
            name: the model's name.
            folder: folder to which the files' paths are relative.
            what: description of the files, for messages.

        Raises:
            IntegrityError: a file differs from its record.
            RegistryError: the store is not responding, or rejects the request.
        """
        missing = {_file_key(name, file): file for file in self.lacks(name, records)}  # each content once
        _copy_all(f"uploading {what}", missing.items(), folder, self.send_file)

    def download(self, name: str, records: Iterable[FileRecord], folder: Path, what: str) -> None:
        """Download files of a model's versions. Files that are already in the folder are skipped.

        Args:
            name: the model's name.
            folder: folder to which the files' paths are relative.
            what: description of the files, for messages.

        Raises:
            DiskSpaceError: there is not enough disk space.
            IntegrityError: an object is missing, truncated or altered.
            RegistryError: the store is not responding, or rejects the request.
        """
        missing = [(_file_key(name, file), file) for file in records if not (folder / file.path).is_file()]
        total = sum(file.bytes for _, file in missing)
        folder.mkdir(parents=True, exist_ok=True)
        if total > (free := shutil.disk_usage(folder).free):
            raise DiskSpaceError(
                f"not enough disk space in {folder} to download {what}: it needs {total / 1e6:.0f} MB, and "
                f"{free / 1e6:.0f} MB are free",
                todo="free disk space: run `svc gc`, or lower artifacts.cache_gb",
            )
        _copy_all(f"downloading {what}", missing, folder, self.receive_file)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys of all objects below a prefix, sorted.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        import obstore

        with self._asking(f"list {prefix}"):
            return sorted(entry["path"] for page in obstore.list(self._client, prefix) for entry in page)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects. Keys that do not exist are ignored.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        import obstore

        for key in keys:
            with self._asking(f"delete {key}"), suppress(FileNotFoundError):
                obstore.delete(self._client, key)

    def read(self, key: str) -> bytes | None:
        """Return the contents of a small object, or None if it does not exist.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        import obstore

        with self._asking(f"read {key}"), suppress(FileNotFoundError):
            return bytes(obstore.get(self._client, key).bytes())
        return None

    def write(self, key: str, content: bytes) -> None:
        """Write a small object, replacing any object with the same key.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        import obstore

        with self._asking(f"write {key}"):
            obstore.put(self._client, key, content)

    def send(self, prefix: str, records: Sequence[FileRecord], folder: Path) -> None:
        """Upload the files of a folder below a prefix.

        Raises:
            IntegrityError: a file differs from its record.
            RegistryError: the store is not responding, or rejects the request.
        """
        _copy_all(f"uploading {prefix}", [(f"{prefix}/{file.path}", file) for file in records], folder, self.send_file)

    def receive(self, prefix: str, records: Sequence[FileRecord], folder: Path) -> None:
        """Download files below a prefix into a folder.

        Raises:
            IntegrityError: an object is missing, truncated or altered.
            RegistryError: the store is not responding, or rejects the request.
        """
        files = [(f"{prefix}/{file.path}", file) for file in records]
        _copy_all(f"downloading {prefix}", files, folder, self.receive_file)

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, or None if it does not exist.

        Raises:
            RegistryError: the store is not responding, or rejects the request.
        """
        import obstore

        with self._asking(f"read {key}"), suppress(FileNotFoundError):
            return obstore.head(self._client, key)["size"]
        return None

    def send_file(self, key: str, file: FileRecord, path: Path, on_bytes: OnBytes = lambda count: None) -> None:
        """Upload one file.

        Args:
            on_bytes: called with the number of bytes sent since the last call.

        Raises:
            IntegrityError: the file is missing, or differs from its record.
            RegistryError: the store is not responding, or rejects the request.
        """
        import obstore

        if not path.is_file():
            raise IntegrityError(
                f"{path} is missing", todo="upload the version from an SVC_HOME folder that contains its weights"
            )
        part = max(_PART, -(-file.bytes // _MAX_PARTS))
        blocks = _read_checked(file, path, part, on_bytes)
        with self._asking(f"write {key} ({file.path}, {file.bytes} bytes)"):
            if file.bytes <= part:
                obstore.put(self._client, key, b"".join(blocks), use_multipart=False)
            else:
                obstore.put(self._client, key, blocks, chunk_size=part, max_concurrency=_AT_ONCE)

    def receive_file(self, key: str, file: FileRecord, path: Path, on_bytes: OnBytes = lambda count: None) -> None:
        """Download one file, which appears at the path only when it is complete and verified.

        Args:
            on_bytes: called with the number of bytes received since the last call.

        Raises:
            IntegrityError: the object is missing, truncated or altered.
            RegistryError: the store is not responding, or rejects the request.
        """
        import obstore

        def read(start: int) -> "Bytes":
            end = min(start + _PART, file.bytes)
            return obstore.get_range(self._client, key, start=start, end=end)

        size = self.size(key)
        if size is None:
            raise self._damaged(key, file, "is missing")
        if size != file.bytes:
            raise self._damaged(key, file, f"has {size} bytes")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as target, self._asking(f"read {key} ({file.path}, {file.bytes} bytes)"):
                for part in _in_order(read, range(0, file.bytes, _PART)):
                    digest.update(part)
                    target.write(part)
                    on_bytes(len(part))
                target.flush()
                os.fsync(target.fileno())
            if digest.hexdigest() != file.sha256:
                raise self._damaged(key, file, f"was altered: sha256 {digest.hexdigest()[:12]}…")
            temporary.chmod(0o444)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _damaged(self, key: str, file: FileRecord, how: str) -> IntegrityError:
        return IntegrityError(
            f"{self.url}/{key} ({file.path}) {how}",
            expected=f"sha256 {file.sha256[:12]}…, {file.bytes} bytes",
            todo="delete the object, then push the version from a home folder that contains it: svc models push NAME@N",
        )

    def _publish(self, manifest: Manifest) -> None:
        """Write a manifest unless the version already has one. An identical manifest counts as success: an earlier
        attempt may have written it, although its response was lost.
        """
        key, content = manifest_key(manifest.id), manifest_bytes(manifest)
        if not self._create(key, content) and self.read(key) != content:
            raise RegistryError(
                f"{manifest.id} is already in {self.url}, registered by another machine: {key}",
                expected="a version number that no machine has published",
                todo="run `svc train` again: it registers the next version number and does not upload the files again",
            )

    def _require_conditions(self) -> None:
        """Check that the store rejects a conditional write to an object that already exists. In a store that accepts
        such a write, two machines that register at the same time could overwrite each other's version.
        """
        import obstore

        key = f"{_PROBES}/{uuid4().hex}"
        with self._asking(f"write {key}"):
            obstore.put(self._client, key, b"")
        try:
            if not self._create(key, b"again"):
                return
        finally:
            with self._asking(f"delete {key}"):
                obstore.delete(self._client, key)
        raise RegistryError(
            f"the object store {self.url} ignores write conditions: it overwrote an object despite `If-None-Match: *`",
            expected="a store that returns status 412 for a conditional write to an existing object, so that two "
            "machines cannot publish the same version",
            todo="use a store with conditional writes, such as Amazon S3 or MinIO: docs/scale.md#object-storage",
        )

    def _create(self, key: str, content: bytes) -> bool:
        """Write an object unless this key already exists. Return whether it was written.

        The client does not retry such a write, because the first attempt may have succeeded although its response was
        lost.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        for pause in (*_CREATE_PAUSES_S, None):
            try:
                with self._asking(f"write {key}"):
                    obstore.put(self._client, key, content, mode="create")
            except AlreadyExistsError:
                return False
            except RegistryError:
                if pause is None:
                    raise
                time.sleep(pause)
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Convert obstore's errors in the `with` block to this project's errors, except AlreadyExistsError.

        obstore's error is not chained, because its text may contain a signed URL.

        Raises:
            RegistryError: the store is not responding, or rejects the request, even after all retries.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except AlreadyExistsError:
            raise
        except (BaseError, FileNotFoundError) as error:
            raise RegistryError(
                f"the object store {self.url} could not {what}: {_reason(error)}",
                expected="a reachable store, and credentials with permission to list, read, write and delete objects",
                todo="check the network and the credentials, then run the same command again; it continues with the "
                "remaining files",
            ) from None


def require_obstore() -> None:
    """Check that the client library for object stores is installed.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        import obstore.store  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "artifacts.url is set, but obstore is not installed", todo="pip install 'tuneserve[objects]'"
        ) from error


def manifest_key(version: VersionId) -> str:
    """Return the key of a version's manifest, relative to the store's prefix."""
    return f"{_MANIFESTS}/{version.name}/{version.number}.json"


def _file_key(name: str, file: FileRecord) -> str:
    return f"{_FILES}/{name}/{file.sha256}/{PurePosixPath(file.path).name}"


def _read_checked(file: FileRecord, path: Path, part: int, on_bytes: OnBytes) -> Iterator[bytes]:
    """Yield a file's contents in blocks.

    Raises:
        IntegrityError: the contents differ from the record. The error is raised after the last block, in time to
            cancel an upload of these blocks.
    """
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(part):
            digest.update(block)
            on_bytes(len(block))
            yield block
    if digest.hexdigest() != file.sha256:
        raise IntegrityError(
            f"{path} was changed after registration: sha256 {digest.hexdigest()[:12]}…",
            expected=f"sha256 {file.sha256[:12]}…, {file.bytes} bytes",
            todo="restore the file from a backup, or train again; registered versions must not be edited",
        )


def _in_order(read: Callable[[int], "Bytes"], starts: Iterable[int]) -> Iterator["Bytes"]:
    """Read a block at each offset in `starts`, and yield the blocks in order. A few threads read blocks ahead of the
    consumer.
    """
    ahead: deque[Future[Bytes]] = deque()
    with ThreadPoolExecutor(_AT_ONCE, "download") as pool:
        for start in starts:
            ahead.append(pool.submit(read, start))
            if len(ahead) > _AT_ONCE:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _copy_all(text: str, files: Collection[tuple[str, FileRecord]], folder: Path, copy: CopyFile) -> None:
    """Upload or download files. The progress is printed after 2 s, and then every 15 s.

    Args:
        text: description of the copies, for the progress.
        files: keys and records of the files.
        folder: folder to which the files' paths are relative.
    """
    from svc.terminal import console

    total = sum(file.bytes for _, file in files)
    started = time.monotonic()
    done, due = 0, started + _FIRST_PROGRESS_S

    def on_bytes(count: int) -> None:
        nonlocal done, due
        done, now = done + count, time.monotonic()
        if now >= due:
            due = now + _PROGRESS_S
            rate = done / 1e6 / (now - started)
            console.print(f"  {text}: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {rate:.0f} MB/s", markup=False)

    for key, file in files:
        copy(key, file, folder / file.path, on_bytes)


def _reason(error: Exception) -> str:
    """Return an error message on one line, without URL signatures or details of the store's response."""
    text = str(error).split("\n\nDebug source", 1)[0]
    for pattern in _HIDDEN:
        text = pattern.sub("", text)
    return " ".join(text.split())[:400]
