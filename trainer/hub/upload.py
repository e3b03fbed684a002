"""Uploads a version to a repository on the Hugging Face Hub, as one commit with a tag.

Before anything is sent, the destination's contents and visibility are checked. The upload's commit names the newest
commit seen in that check as its parent, so it fails if someone else has changed the repository since.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.errors import (
    AuthenticationError,
    NotFoundError,
    PermissionDeniedError,
    RefusedError,
    ServerNotRunningError,
    SvcError,
)
from svc.files.json_file import read_json_object
from svc.registry.adapter import CONFIG_FILE
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.terminal import console, waiting
from svc.version import Format, VersionId
from trainer.hub.card import hub_base, make_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD_FILE = "README.md"
_XET_ADVICE = "; for a server without the Hub's Xet storage, set HF_HUB_DISABLE_XET=1"
_ATTRIBUTES = ".gitattributes"
"""File that the Hub adds to every repository."""


@dataclass(frozen=True, slots=True)
class UploadFile:
    """A file to upload.

    Attributes:
        path: path of the file in the repository.
        content: path of the file on this machine, or its contents.
    """

    path: str
    content: Path | bytes

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True, slots=True)
class Destination:
    """The state of a repository on the Hub when it was checked.

    Attributes:
        repo: `org/name`.
        public: whether everyone can read the repository.
        exists: whether it has been created.
        commit: the newest commit, or None if the repository does not exist.
        files: the files in the repository, without `.gitattributes`.
        tag: name of the version's tag in the repository.
        has_tag: whether the tag exists.
    """

    repo: str
    public: bool
    exists: bool
    commit: str | None
    files: tuple[str, ...]
    tag: str
    has_tag: bool


def files_to_upload(registry: Registry, manifest: Manifest, format: Format, repo: str) -> list[UploadFile]:
    """Return the files of a version in one format, after checking their hashes. The model card comes first.

    An adapter's config contains the path of its base on this machine, which is replaced by the base's Hub id.

    Raises:
        NotFoundError: the version does not have the format.
        RefusedError: the version failed a check, or the recipe modifies the base, so the adapter does not match the
            original base.
        IntegrityError: a file is missing or was changed.
    """
    version = manifest.id
    if format not in manifest.formats:
        raise NotFoundError(
            f"{version} has no format {format}",
            expected=f"one of {', '.join(manifest.formats)}",
            todo="choose one with --format",
        )
    if manifest.failed:
        raise RefusedError(
            f"{version} failed a check: {manifest.failed[0]}",
            expected="a version that passed all checks",
            todo="push another version, or fix the cause and train again",
        )
    if format is Format.ADAPTER and (changed := _base_changes(manifest.recipe)):
        raise RefusedError(
            f"the adapter of {version} does not fit the published base, because its recipe sets {', '.join(changed)}",
            expected="a format that contains the changed base",
            todo=f"push it with --format {Format.MERGED}",
        )
    registry.verify(version, format)
    folder = registry.artifact(version, format)
    files = [UploadFile(CARD_FILE, make_card(registry, manifest, format, repo).encode())]
    for record in registry.format(version, format).files:
        path = Path(record.path).relative_to(format).as_posix()
        if path == CARD_FILE:
            continue
        content: Path | bytes = folder / path
        if format is Format.ADAPTER and path == CONFIG_FILE:
            config = read_json_object(folder / path) | {"base_model_name_or_path": hub_base(manifest)}
            content = (json.dumps(config, indent=2) + "\n").encode()
        files.append(UploadFile(path, content))
    return files


def _base_changes(recipe: Mapping[str, Any]) -> list[str]:
    """Return the recipe keys that modify the base itself. With them, the adapter does not match the original base."""
    values = {key: recipe.get(key) for key in ("chat_template", "new_tokens")}
    values["rope_scaling"] = (recipe.get("rope_scaling") or {}).get("type")
    return [key for key, value in values.items() if value]


def connect() -> "HfApi":
    """Return a client for the Hub, or for the server given by HF_ENDPOINT.

    Raises:
        AuthenticationError: there is no token.
        NotFoundError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        raise NotFoundError(
            "huggingface_hub is not installed", todo="install it: pip install 'tuneserve[train]'"
        ) from error
    if not (token := get_token()):
        raise AuthenticationError(
            "there is no token for the Hugging Face Hub",
            expected="a token that may write to the repository",
            todo="set HF_TOKEN, or run `hf auth login`",
        )
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)


def check_destination(api: "HfApi", repo: str, version: VersionId, *, public: bool, replace: bool) -> Destination:
    """Return the state of a repository, without changing it.

    Args:
        public: whether everyone may read the version.
        replace: whether existing files in the repository may be replaced. They remain in its history.

    Raises:
        RefusedError: the repository is not empty, or its visibility is not as requested.
        AuthenticationError, PermissionDeniedError: the Hub rejects the token.
        ServerNotRunningError: the Hub is not responding.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    tag = f"v{version.number}"
    with _hub_errors(repo):
        try:
            info = api.model_info(repo)
            refs = api.list_repo_refs(repo)
        except RepositoryNotFoundError:
            return Destination(repo, public, exists=False, commit=None, files=(), tag=tag, has_tag=False)
    is_public = not info.private
    if is_public is not public:
        readers = "public" if is_public else "private"
        raise RefusedError(
            f"{repo} exists and is {readers}",
            expected="a public repository" if public else "a private repository, because --public was not given",
            todo=f"{'omit' if public else 'add'} --public, change the visibility of {repo} in its settings, "
            "or choose another name",
        )
    files = tuple(sorted(file.rfilename for file in info.siblings or () if file.rfilename != _ATTRIBUTES))
    has_tag = any(ref.name == tag for ref in refs.tags)
    if (files or has_tag) and not replace:
        raise RefusedError(
            f"{repo} already has {f'{len(files)} files, such as {files[0]}' if files else f'the tag {tag}'}",
            expected="a new or empty repository",
            todo="add --replace to replace the repository's files in one commit, or choose another repository",
        )
    return Destination(repo, is_public, exists=True, commit=info.sha, files=files, tag=tag, has_tag=has_tag)


def upload(api: "HfApi", destination: Destination, files: list[UploadFile], version: VersionId) -> tuple[str, str]:
    """Replace the contents of a repository with the given files, tag the commit, and return its id and its URL.

    If the upload is interrupted, the repository keeps its earlier files. The next upload does not resend large files
    that have arrived completely.

    Raises:
        RefusedError: the Hub rejects a request, or the repository was changed in the meantime.
        AuthenticationError, PermissionDeniedError: the Hub rejects the token.
        ServerNotRunningError: the Hub is not responding.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not console.is_terminal:
        disable_progress_bars()
    repo, uploaded = destination.repo, {file.path for file in files}
    operations: list[Any] = [CommitOperationAdd(file.path, file.content) for file in files]
    operations += [CommitOperationDelete(path) for path in destination.files if path not in uploaded]
    with _hub_errors(repo):
        if not destination.exists:
            api.create_repo(repo, private=not destination.public)
            if not destination.public and not api.model_info(repo).private:  # a server that does not know the option
                raise RefusedError(
                    f"{repo} was created, but everyone can read it", todo="delete the repository, or add --public"
                )
        progress = nullcontext() if console.is_terminal else waiting(f"Uploading {version} to {repo}")
        with progress:  # on a terminal, huggingface_hub shows bars
            commit = api.create_commit(
                repo, operations, commit_message=f"Upload {version}", parent_commit=destination.commit
            )
        if destination.has_tag:
            api.delete_tag(repo, tag=destination.tag)
        api.create_tag(repo, tag=destination.tag, revision=commit.oid, tag_message=str(version))
    return commit.oid, commit.commit_url


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Convert huggingface_hub's exceptions into errors with advice."""
    # HTTPError is that of the HTTP client in use: httpx, or httpx2 in newer releases
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except HfHubHTTPError as error:
        raise _rejection(repo, error.response.status_code, _first_line(error)) from error
    except (HTTPError, OSError) as error:
        raise ServerNotRunningError(
            f"the Hugging Face Hub is not responding: {_first_line(error)}",
            todo="check the network and HF_ENDPOINT, and run the command again: uploaded files are not sent again"
            + _XET_ADVICE,
        ) from error
    except (ValueError, RuntimeError) as error:  # an invalid response, or a file that could not be sent
        raise RefusedError(
            f"the upload to {repo} failed: {_first_line(error.__cause__ or error)}",
            todo="run the command again" + _XET_ADVICE,
        ) from error


def _rejection(repo: str, status: int, reason: str) -> SvcError:
    if status == 401:
        return AuthenticationError(
            f"the Hugging Face Hub rejected the token: {reason}", todo="set another HF_TOKEN, or run `hf auth login`"
        )
    if status == 403:
        return PermissionDeniedError(
            f"the token has no write access to {repo}: {reason}", todo=f"create a token with write access to {repo}"
        )
    if status == 412:
        return RefusedError(
            f"{repo} was changed during the upload", todo="review the change on the Hub, then run the command again"
        )
    return RefusedError(f"the Hugging Face Hub rejected {repo}: {reason}", todo="check the name of the repository")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
