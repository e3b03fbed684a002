"""What an offline run of Weights & Biases holds: its file, which is a log of its own protocol buffers."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 2**15
_FULL, _LAST = 1, 4


@dataclass
class OfflineRun:
    """One file, as `wandb sync` would send it."""

    run_id: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def read_offline_runs(folder: Path) -> list[OfflineRun]:
    """All below a folder, in the order in which they began."""
    return [_read(path) for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns)]


def _read(path: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    found = OfflineRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                found.run_id, found.project = record.run.run_id, record.run.project
                found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case "history":
                items = record.history.item
                found.history.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
    return found


def _records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format after a header of 7 bytes: blocks of 32 KiB of parts with checksum, length and kind."""
    assert content.startswith(b":W&B")
    at, whole = 7, b""
    while at + 7 <= len(content):
        if _BLOCK - at % _BLOCK < 7:  # no part begins so near to a block's end
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0:
            at += _BLOCK - at % _BLOCK
            continue
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_FULL, _LAST):
            yield whole
            whole = b""
