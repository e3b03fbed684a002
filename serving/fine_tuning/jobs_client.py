"""Fine-tuning jobs for `svc jobs`, read from this machine's store or from a server's API.

Both sources return the JSON objects of OpenAI's API, so that the commands' output is the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

from sqlalchemy import Engine as Store

from serving.fine_tuning.rows import Wanted
from svc.identity.actor import Actor
from svc.remote.remote_server import RemoteServer
from svc.remote.server_url import ServerAddress
from svc.store.audit import Action, AuditEntry
from svc.store.statuses import JobStatus

_PATH = "/v1/fine_tuning/jobs"
_VERBS = {Wanted.RUN: "resume", Wanted.PAUSE: "pause", Wanted.CANCEL: "cancel"}
_PAGE, _NEWEST = 100, 10


class Jobs(Protocol):
    """The fine-tuning jobs of a server or of this machine."""

    def recent(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest jobs, newest first."""

    def find(self, id: str) -> dict[str, Any]:
        """Return the job with the given id."""

    def events(self, id: str, after: str | None) -> Iterator[dict[str, Any]]:
        """Yield a job's events, oldest first: all of them, or only those after a given event."""

    def newest_events(self, id: str) -> list[dict[str, Any]]:
        """Return the newest events of a job, newest first."""

    def change(self, id: str, wanted: Wanted) -> dict[str, Any]:
        """Cancel, pause or resume a job, and return it."""


@dataclass(frozen=True, slots=True)
class RemoteJobs:
    """A server's jobs that are visible to the key."""

    server: ServerAddress

    def recent(self, limit: int) -> list[dict[str, Any]]:
        return list(RemoteServer(self.server).get(_PATH, limit=str(limit))["data"])

    def find(self, id: str) -> dict[str, Any]:
        return RemoteServer(self.server).get(_path(id))

    def events(self, id: str, after: str | None) -> Iterator[dict[str, Any]]:
        def read(after: str | None) -> dict[str, Any]:
            query = {"limit": str(_PAGE), "order": "asc"} | ({"after": after} if after else {})
            return RemoteServer(self.server).get(f"{_path(id)}/events", **query)

        return _all_pages(read, after)

    def newest_events(self, id: str) -> list[dict[str, Any]]:
        return list(RemoteServer(self.server).get(f"{_path(id)}/events", limit=str(_NEWEST))["data"])

    def change(self, id: str, wanted: Wanted) -> dict[str, Any]:
        return RemoteServer(self.server).post(f"{_path(id)}/{_VERBS[wanted]}", {})


@dataclass(frozen=True, slots=True)
class LocalJobs:
    """All jobs in this machine's store, whether or not a server is running.

    Attributes:
        organization: value of `organization_id` in the returned jobs.
    """

    store: Store
    organization: str

    def recent(self, limit: int) -> list[dict[str, Any]]:
        from serving.fine_tuning.routes import job_object  # imports FastAPI, which the remote commands do not need
        from serving.fine_tuning.rows import read_jobs
        from serving.http.page import Page

        jobs, _ = read_jobs(self.store, None, page=Page(limit))
        return [job_object(job, self.organization) for job in jobs]

    def find(self, id: str) -> dict[str, Any]:
        from serving.fine_tuning.routes import job_object
        from serving.fine_tuning.rows import find_job

        return job_object(find_job(self.store, id, None), self.organization)

    def events(self, id: str, after: str | None) -> Iterator[dict[str, Any]]:
        from serving.fine_tuning.routes import event_number, event_object
        from serving.fine_tuning.rows import read_events
        from serving.http.page import Page

        def read(after: str | None) -> dict[str, Any]:
            page = Page(_PAGE, None if after is None else event_number(after), newest_first=False)
            events, more = read_events(self.store, id, page=page)
            return {"data": [event_object(event) for event in events], "has_more": more}

        return _all_pages(read, after)

    def newest_events(self, id: str) -> list[dict[str, Any]]:
        from serving.fine_tuning.routes import event_object
        from serving.fine_tuning.rows import read_events
        from serving.http.page import Page

        events, _ = read_events(self.store, id, page=Page(_NEWEST))
        return [event_object(event) for event in events]

    def change(self, id: str, wanted: Wanted) -> dict[str, Any]:
        from serving.fine_tuning.request_rows import change_wanted
        from serving.fine_tuning.routes import job_object

        entry = AuditEntry(Action.CANCEL_JOB, id, Actor.local()) if wanted is Wanted.CANCEL else None
        return job_object(change_wanted(self.store, id, None, wanted, entry), self.organization)


def has_ended(job: dict[str, Any]) -> bool:
    """Return whether a job has ended."""
    return JobStatus(job["status"]).ended


def _path(id: str) -> str:
    return f"{_PATH}/{quote(id, safe='')}"


def _all_pages(read: Callable[[str | None], dict[str, Any]], after: str | None) -> Iterator[dict[str, Any]]:
    more = True
    while more:
        page = read(after)
        yield from page["data"]
        more = bool(page["has_more"]) and bool(page["data"])
        after = page["data"][-1]["id"] if page["data"] else after
