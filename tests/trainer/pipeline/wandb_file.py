"""Reads offline runs of Weights & Biases, whose file is a log of protocol buffers."""

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
    """Content of one offline run file, as `wandb sync` would send it."""

    run_id: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def read_offline_runs(folder: Path) -> list[OfflineRun]:
    """Return all runs below a folder, in order of their start."""
    return [_read(path) for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns)]


def _read(path: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run.run_id, run.project = record.run.run_id, record.run.project
                run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case "history":
                items = record.history.item
                run.history.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
    return run


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, after a header of 7 bytes.

    Blocks of 32 KiB contain fragments with a checksum, length and kind.
    """
    assert content.startswith(b":W&B")
    at, record = 7, b""
    while at + 7 <= len(content):
        if _BLOCK - at % _BLOCK < 7:  # no part begins so close to the end of a block
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0:
            at += _BLOCK - at % _BLOCK
            continue
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_FULL, _LAST):
            yield record
            record = b""
