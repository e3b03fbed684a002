"""Builds folders in the base model cache, where other processes may be building the same folders."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Build a folder under a temporary name and then rename it, so that an incomplete folder is never visible.

    If two processes build the same folder, the process that finishes second deletes its own copy.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def changed_folder(folder: Path, texts: Mapping[str, str], cache: Path, without: Collection[str] = ()) -> Path:
    """Return a cache folder with links to a folder's files, except for files that are replaced or omitted.

    The cache folder's name is a hash of the new contents and the linked paths, so a new cache folder is built if the
    original folder gains files or is moved.

    Args:
        texts: contents of the replaced files, keyed by file name.
        cache: parent of these cache folders; any number of processes may share it.
        without: names of the omitted files.
    """
    files = sorted(path for path in folder.absolute().iterdir() if path.is_file())
    links = [path for path in files if path.name not in (*without, *texts)]
    digest = hashlib.sha256(json.dumps([texts, [str(link) for link in links]]).encode()).hexdigest()
    return build_once(cache / digest[:32], partial(_write, texts, links))


def _write(texts: Mapping[str, str], links: list[Path], out: Path) -> None:
    for name, text in texts.items():
        (out / name).write_text(text, "utf-8")
    for link in links:
        (out / link.name).symlink_to(link)
