"""The folders of snapshots in a backup folder: `DIR/snapshots/TIME/`, with `snapshot.json` written last."""

import re
from datetime import datetime
from pathlib import Path

RECORD_FILE = "snapshot.json"
_NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z")


def snapshot_folders(backups: Path) -> list[Path]:
    """Return the folders of all snapshots in a backup folder, oldest first, including unfinished ones."""
    parent = backups / "snapshots"
    return sorted(folder for folder in parent.iterdir() if _NAME.fullmatch(folder.name)) if parent.is_dir() else []


def newest_snapshot_at(backups: Path) -> datetime | None:
    """Return the time of the newest finished snapshot, or None if there is none. The snapshot's record is not read.

    Raises:
        OSError: the folder cannot be read.
    """
    finished = (folder for folder in reversed(snapshot_folders(backups)) if (folder / RECORD_FILE).is_file())
    newest = next(finished, None)
    return datetime.strptime(newest.name, "%Y%m%dT%H%M%S.%f%z") if newest else None
