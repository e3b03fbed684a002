"""A service with the fine-tuning API, clients' files, and the official client over a real server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from openai import AsyncOpenAI
from openai import BaseModel as OfficialModel
from sqlalchemy import Engine as Store

from serving.access.keyring import IssuedKey
from serving.files.client_files import ClientFiles
from serving.files.rows import FileStatus, Purpose, set_file_status
from serving.fine_tuning.training_check import TrainingCheck
from serving.http.connections import watched
from svc.settings.client_apis import FilesSettings, FineTuningSettings, TrainingPlace
from svc.settings.settings import Settings
from svc.settings.storage import ArtifactSettings
from tests.serving.http.keyed_service import KeyedService
from tests.serving.service import ClientsProtocol
from tests.serving.socket_server import running

BASE = "gpt-4o-mini-2024-07-18"
Official = TypeVar("Official", bound=OfficialModel)


@dataclass
class FakeCheck:
    """Stands for `svc estimate`, which takes seconds.

    Attributes:
        result: the check to return, or the error to raise.
        recipes: the recipes that were checked.
    """

    result: TrainingCheck | Exception = TrainingCheck(examples=200, learning_rate=5e-4, seconds=60.0)  # noqa: RUF009
    recipes: list[str] = field(default_factory=list)

    async def __call__(self, recipe: str, settings: Settings, *, timeout_s: float) -> TrainingCheck:
        self.recipes.append(recipe)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class FineTuningService(KeyedService):
    """A service whose clients may train one base.

    Args:
        base: folder of the base, or None for no bases.
        max_jobs: maximum number of jobs of one key that have not ended.
        place: where jobs are trained.
        limits: limits of clients' files.
        artifacts: settings of the object store; none by default.
    """

    def __init__(
        self,
        folder: Path,
        *,
        store: Store,
        base: Path | None,
        max_jobs: int = 50,
        place: TrainingPlace = TrainingPlace.HERE,
        limits: FilesSettings | None = None,
        artifacts: ArtifactSettings | None = None,
        **settings: Any,
    ) -> None:
        bases = {BASE: str(base), "gone": str(base / "gone")} if base else {}
        self.tuning = FineTuningSettings(bases=bases, max_jobs=max_jobs, place=place)
        super().__init__(folder, store=store, fine_tuning=self.tuning, files=limits, artifacts=artifacts, **settings)
        self.settings = Settings(home=folder, fine_tuning=self.tuning, artifacts=artifacts or ArtifactSettings())
        self.files = ClientFiles.of(self.settings, store)

    def add_file(
        self,
        content: str = "{}\n",
        *,
        owner: str = "",
        purpose: Purpose = Purpose.FINE_TUNE,
        status: FileStatus = FileStatus.PROCESSED,
        details: str | None = None,
    ) -> str:
        """Add a file of a client and return its id."""
        assert self.store is not None
        with self.files.writing() as (id, writer):
            writer.write(content.encode())
            self.files.add(id, writer, owner=owner, purpose=purpose, filename="a.jsonl")
        set_file_status(self.store, id, status, details)
        return id

    @asynccontextmanager
    async def official(self, key: IssuedKey | None = None, **options: Any) -> AsyncIterator[AsyncOpenAI]:
        """Yield the official client, which reaches the application through a real server."""
        socket = self.folder / f"{key.key.id if key else 'clients'}.sock"
        async with running(watched(self.app), socket, ClientsProtocol):
            http = httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(uds=str(socket)))
            secret = key.secret if key else "none"
            async with AsyncOpenAI(
                api_key=secret, base_url="http://localhost/v1", http_client=http, **({"max_retries": 0} | options)
            ) as official:
                yield official

    def contents(self) -> list[str]:
        """Return the names of the stored contents of files."""
        return [path.name for path in (self.folder / "files").iterdir()]


def strict(kind: type[Official], given: Any) -> Official:
    """Return an object after validating it with the official client's model, without conversions or other fields."""
    assert set(given) == set(kind.model_fields)
    return kind.model_validate(given, strict=True)
