"""Resolves a source of examples (a file, a folder or a Hugging Face Hub dataset) to a list of files.

A Hub dataset is written as `hf:ORG/NAME`, because a plain `ORG/NAME` could also be a path. Only its data
files are fetched; code that comes with a dataset is never run.
"""

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from svc.dataset.readers.file_types import COMPRESSIONS, CONTAINERS, DOCUMENTS, bare_name, is_data_file
from svc.errors import DataError
from svc.terminal import console, waiting

HUB_PREFIX = "hf:"
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?:/(?P<within>.+))?")
_WORD = "(?<![a-z]){}(?![a-z])"
_TRAINING = re.compile(_WORD.format("(train|training)"))
_OTHER_SPLITS = re.compile(_WORD.format("(validation|valid|val|dev|test|testing|eval|evaluation)"))
"""Matches the words that mark a path as a validation or test split on the Hub
(https://huggingface.co/docs/hub/datasets-file-names-and-splits)."""
_NO_EXAMPLES = {"dataset_info.json", "dataset_infos.json", "state.json"}
_DATASET_CARD = "README.md"
DEFAULT_CACHE = Path("~/.cache/tuneserve/base")
"""Folder for files fetched from the Hub when the caller has no settings."""


def data_files(source: str | Path, cache: Path | None = None, *, fetch: Callable[..., Any] | None = None) -> list[Path]:
    """Return the data files of a source, in reading order.

    Args:
        source: a file, a folder or `hf:ORG/NAME[@REVISION][/FILE-OR-FOLDER]`. All data files in a folder and
            its subfolders are read, sorted by path. Test and validation files of a Hub dataset are read only
            if FILE-OR-FOLDER names the split.
        cache: folder for files fetched from the hub.
        fetch: function to call instead of `huggingface_hub.snapshot_download`.

    Raises:
        DataError: a folder has no data files, or a hub dataset cannot be fetched or has no training split.
    """
    text = str(source)
    if text.startswith(HUB_PREFIX):
        return _hub_files(text, (cache or DEFAULT_CACHE).expanduser(), fetch)
    path = Path(source)
    return _folder_files(path) if path.is_dir() else [path]


def newest_modification(sources: Iterable[str | Path]) -> datetime | None:
    """Return the most recent modification time of the local files, or None if no source is local.

    Files of hub datasets are skipped, because their times are download times.

    Raises:
        DataError: a folder has no data files.
        OSError: a file does not exist.
    """
    local = [source for source in sources if not str(source).startswith(HUB_PREFIX)]
    times = [file.stat().st_mtime for source in local for file in data_files(source)]
    return datetime.fromtimestamp(max(times), UTC) if times else None


def _folder_files(folder: Path) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    files = [path for path in found if is_data_file(path) and path.name not in _NO_EXAMPLES]
    files = files or [path for path in found if bare_name(path).endswith(DOCUMENTS) and path.name != _DATASET_CARD]
    if not files:
        raise DataError(
            f"the folder {folder} contains no data files",
            expected=f"file names ending in {', '.join(CONTAINERS)}, optionally followed by {', '.join(COMPRESSIONS)}",
            todo="check the path",
        )
    return files


def _hub_files(source: str, cache: Path, fetch: Callable[..., Any] | None) -> list[Path]:
    named = _HUB_ID.fullmatch(source.removeprefix(HUB_PREFIX))
    if not named or ".." in (named["within"] or "").split("/"):
        expected = "hf:ORG/NAME, or hf:ORG/NAME@REVISION/FOLDER"
        raise DataError(f"{source!r} is not a valid hub dataset", expected=expected, todo="correct the name")
    snapshot = _snapshot(named["id"], named["revision"], cache, fetch)
    path = snapshot / (named["within"] or "")
    if not path.exists():
        names = sorted(file.name for file in snapshot.iterdir())
        raise DataError(
            f"{named['id']} has no data file or folder {named['within']!r}",
            expected=f"one of {', '.join(names)}" if names else "a dataset with data files",
            todo="correct the part after the dataset's name",
        )
    if _OTHER_SPLITS.search((named["within"] or "").lower()):
        return data_files(path)
    return _training_files(named["id"], path)


def _training_files(dataset: str, path: Path) -> list[Path]:
    """Return the files of a Hub dataset, excluding test and validation splits, which are meant to be held out.

    Raises:
        DataError: no files are left.
    """
    files = data_files(path)
    names = {file: file.relative_to(path).as_posix().lower() for file in files if file != path}
    others = [name for name in names.values() if _OTHER_SPLITS.search(name) and not _TRAINING.search(name)]
    training = [file for file in files if names.get(file) not in others]
    if not training:
        raise DataError(
            f"{dataset} contains only test and validation splits: {', '.join(others)}",
            expected="a training split",
            todo=f"to use one of these files, name it: hf:{dataset}/FILE-OR-FOLDER",
        )
    if others:
        console.print(
            f"  {dataset}: skipping files of other splits; to use such a file, name it explicitly: {', '.join(others)}"
        )
    return training


def _snapshot(dataset: str, revision: str | None, cache: Path, fetch: Callable[..., Any] | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise DataError(
            f"cannot fetch {dataset}: huggingface_hub is not installed",
            expected="the packages of the `train` extra",
            todo="pip install 'tuneserve[train]', or copy the dataset to this machine and specify its folder",
        ) from error
    patterns = [f"*{container}{end}" for container in CONTAINERS for end in ("", *COMPRESSIONS)]
    try:
        with waiting(f"Fetching dataset {dataset} from the Hugging Face hub"):
            folder = (fetch or snapshot_download)(
                dataset, repo_type="dataset", revision=revision, cache_dir=cache / "hub", allow_patterns=patterns
            )
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"dataset {dataset} is not in the cache and the Hugging Face hub cannot be reached",
            expected="a network connection, or the dataset in a local folder",
            todo="check the network, or copy the dataset to this machine and specify its folder",
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise DataError(
            f"the Hugging Face hub rejected dataset {dataset}: {(str(error).strip().splitlines() or ['?'])[0]}",
            expected="the id of a public dataset, or of a dataset that HF_TOKEN can read",
            todo="check the id; for a gated dataset, accept its terms on the hub and set HF_TOKEN",
        ) from error
    return Path(folder)
