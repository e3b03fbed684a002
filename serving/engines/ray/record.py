"""A server's record of an engine's actor, kept in the home folder so that a later server can adopt or stop the actor.

The record contains the server's private key for the actor, so only the user who runs the server can read it.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from serving.engines.ray.cluster import RayCluster
from serving.engines.ray.link import Placed
from svc.errors import EngineError
from svc.files.disk import write_whole

RECORD_FILE = "actor.json"
_ENDING = "ending"

log = logging.getLogger(__name__)


class ActorRecord(BaseModel):
    """A record of an actor.

    Attributes:
        name: the actor's name in the cluster.
        cluster: address of the cluster.
        certificate, key: the server's key pair, in PEM format.
        placed: address of the actor, or None before it runs.
        launch: digest of the engine's launch options, or None before it runs.
        holds: identity of the weights that were last verified to be loaded, or None if unknown.
        folder: the engine's folder; set by `write_actor`.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    cluster: str
    certificate: str
    key: str
    placed: Placed | None = None
    launch: str | None = None
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

    A record that was copied as part of a home folder is also ignored, because the actor belongs to the original folder.
    """
    try:
        record = ActorRecord.model_validate_json((folder / RECORD_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return record if record.folder == folder.resolve() else None


def end_actor(folder: Path) -> None:
    """Stop the actor that is recorded in an engine's folder, if there is one. This blocks for several seconds. If its
    cluster cannot be reached, the stop is postponed.
    """
    record = read_actor(folder)
    if record is None:
        return
    try:
        RayCluster(record.cluster).end(record.name)
    except EngineError as error:
        log.warning("could not stop actor %s; retrying later: %s", record.name, error.wrong)
        postpone_end(folder)
    (folder / RECORD_FILE).unlink(missing_ok=True)


def postpone_end(folder: Path) -> None:
    """Replace the record in an engine's folder with a note that its actor must be stopped later, so that a new record
    can be written.
    """
    record = read_actor(folder)
    if record is None:
        return
    notes = folder.parent / _ENDING
    notes.mkdir(exist_ok=True)
    without_key = record.model_copy(update={"certificate": "", "key": ""})
    write_whole(notes / f"{record.name}.json", without_key.model_dump_json().encode("utf-8"))
    (folder / RECORD_FILE).unlink(missing_ok=True)


def end_postponed(engines: Path) -> tuple[list[str], list[str]]:
    """Stop the actors whose stop was postponed. This blocks for several seconds per cluster.

    Args:
        engines: folder that contains the engines' folders.

    Returns:
        The names of the actors that were stopped, and the names of the actors that remain because their cluster still
        cannot be reached.

    Raises:
        OSError: a note left by `postpone_end` cannot be read or deleted.
    """
    by_cluster = dict[str, dict[str, Path]]()
    for note in sorted((engines / _ENDING).glob("*.json")):
        if record := _postponed(note):
            by_cluster.setdefault(record.cluster, {})[record.name] = note
    ended, left = list[str](), list[str]()
    for cluster, notes in by_cluster.items():
        try:
            RayCluster(cluster).end(*notes)
        except EngineError:
            left += notes
            continue
        for note in notes.values():
            note.unlink()
        ended += notes
    return ended, left


def _postponed(note: Path) -> ActorRecord | None:
    """Return the actor named in a note left by `postpone_end`, or None if the note is damaged or was copied as part of
    a home folder.
    """
    with suppress(ValidationError):
        record = ActorRecord.model_validate_json(note.read_bytes())
        if record.folder is not None and record.folder.parent == note.parent.parent.resolve():
            return record
    return None
