"""Removes clients' expired files and uploads, and file contents that a crash has left without a row in the store.

With an object store, contents of deleted files are removed from it, and contents that it lacks are uploaded to it.
"""

import asyncio
import logging

from sqlalchemy.exc import SQLAlchemyError

from serving.files.client_files import ClientFiles
from serving.files.shared_contents import ContentStoreError
from serving.files.uploads import ClientUploads
from svc.store.outage_log import log_store_error

log = logging.getLogger(__name__)

_INTERVAL_S = 60.0
_UNKNOWN_EVERY = 60  # times the interval


async def run_cleanup(files: ClientFiles, uploads: ClientUploads, *, interval_s: float = _INTERVAL_S) -> None:
    """Clean up clients' files and uploads at intervals until cancelled. Several servers may run this concurrently."""
    count = 0
    while True:
        try:
            await asyncio.to_thread(_clean_up, files, uploads, unknown=count % _UNKNOWN_EVERY == 0)
        except SQLAlchemyError:
            log_store_error(log, "could not remove expired files")
        except OSError:
            log.exception("could not remove expired files")
        except ContentStoreError:
            log.warning("could not remove or upload files in the object store; retrying")
        count += 1
        await asyncio.sleep(interval_s)


def _clean_up(files: ClientFiles, uploads: ClientUploads, *, unknown: bool) -> None:
    expired = files.remove_expired(), uploads.remove_expired()
    if any(expired):
        log.info("removed %d files and %d uploads that have expired", *expired)
    if unknown and (removed := files.remove_unknown() + uploads.remove_unknown()):
        log.info("removed the contents of %d files that a crash had left without an entry in the store", removed)
    files.tidy_shared()
    if unknown and (shared := files.share_missing()):
        log.info("uploaded the contents of %d files that the object store lacked", shared)
