"""What a server records about an engine's actor, in its home, so that a later server can adopt or end it.

The record contains the server's private key for the actor, so only its owner can read it.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from svc.files.disk import write_whole
from svc.ray_engine.cluster import Placed, RayCluster

RECORD_FILE = "actor.json"


class ActorRecord(BaseModel):
    """A record of an actor.

    Attributes:
        name: the actor's name in the cluster.
        cluster: address of the cluster.
        certificate, key: the server's key pair, as PEM texts.
        placed: where the actor listens, or None before it runs.
        launch: digest of the engine's launch options, or None before it runs.
        plan: the launch options, for display.
        holds: what was last verified to be loaded, or None if unknown.
        folder: the engine's folder, which `write_actor` adds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    cluster: str
    certificate: str
    key: str
    placed: Placed | None = None
    launch: str | None = None
    plan: list[dict[str, Any]] | None = None
    holds: str | None = None
    folder: Path | None = None


def write_actor(folder: Path, record: ActorRecord) -> None:
    """Write the record, atomically replacing any earlier one."""
    before = os.umask(0o077)
    try:
        own = record.model_copy(update={"folder": folder.resolve()})
        write_whole(folder / RECORD_FILE, own.model_dump_json().encode("utf-8"))
    finally:
        os.umask(before)


def read_actor(folder: Path) -> ActorRecord | None:
    """Return the record in an engine's folder, or None if it is missing or damaged.

    A record that was copied along with its home is ignored, too: the actor is that of the other home.
    """
    try:
        record = ActorRecord.model_validate_json((folder / RECORD_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return record if record.folder == folder.resolve() else None


def end_actor(folder: Path) -> None:
    """End the actor that is recorded in an engine's folder, if there is one. This blocks for several seconds.

    Raises:
        EngineError: the cluster cannot be reached.
    """
    record = read_actor(folder)
    if record is not None:
        RayCluster(record.cluster).end_now(record.name)
        (folder / RECORD_FILE).unlink(missing_ok=True)
