"""Settings of OpenAI's fine-tuning, batch and files APIs."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from svc.settings.section import Section, absolute


def _base(text: str) -> str:
    """Return the absolute path of a base model that is given as a path, or return any other base unchanged."""
    is_path = text.startswith((".", "/", "~")) or text.endswith(".gguf")
    return str(absolute(Path(text))) if is_path else text


_CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
"""Valid names by which clients refer to bases. A colon would make the names of trained models, `ft:BASE:...`,
ambiguous."""


class TrainingPlace(StrEnum):
    """Location where jobs of the fine-tuning API run."""

    HERE = "here"
    RAY = "ray"


class FineTuningSettings(Section):
    """Settings of OpenAI's fine-tuning API. See docs/fine-tuning-api.md."""

    bases: dict[str, Annotated[str, Field(min_length=1), AfterValidator(_base)]] = Field({})
    """Bases that clients may fine-tune, keyed by the name that clients use; each value has the same form as `base` in a
    recipe, for example `{gpt-4o-mini-2024-07-18: ./models/SmolLM2-135M-Instruct}`; default: none, which disables the
    API."""
    organization: str = Field("tuneserve", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the organization in jobs and in the names of trained models, `ft:BASE:ORGANIZATION:...`."""
    idle_s: float = Field(600, gt=0)
    """Idle time in seconds after which a model that was loaded for a client's request is stopped."""
    max_age_days: float = Field(90.0, gt=0, le=36_500)
    """Days to keep a finished job and its events; a job is kept longer while its model or a checkpoint is
    registered."""
    max_jobs: int = Field(50, ge=1)
    """Maximum number of unfinished jobs per key."""
    worker: bool = True
    """Whether this server runs jobs; if not, another server with the same store must run them."""
    place: TrainingPlace = TrainingPlace.HERE
    """`here`: jobs run on the server's machine; `ray`: jobs run on the cluster at `ray.address`, as with
    `svc train --on ray`, and the server's machine only registers the version."""
    wandb: bool = False
    """Whether jobs may report to Weights & Biases, with the API key in this server's environment."""

    @field_validator("bases")
    @classmethod
    def _check_names(cls, bases: dict[str, str]) -> dict[str, str]:
        for name in bases:
            if not _CLIENT_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a valid name; use letters, digits and . _ - / only")
        return bases


class BatchSettings(Section):
    """Settings of OpenAI's Batch API. See docs/batches-api.md."""

    max_age_days: float = Field(90.0, gt=0, le=36_500)
    """Days to keep a finished batch; its files are not deleted with it."""
    max_open: int = Field(20, ge=1)
    """Maximum number of unfinished batches per key."""
    concurrency: int = Field(16, ge=1, le=1024)
    """Maximum number of batch requests that a model answers concurrently; fewer run while other clients need the
    capacity."""


class FilesSettings(Section):
    """Limits on files that clients upload. See docs/files-api.md."""

    max_mb: int = Field(512, ge=1)
    """Maximum size of a file that is uploaded in one request, in MiB."""
    max_upload_gb: float = Field(8.0, gt=0)
    """Maximum size of a file that is uploaded in parts, in GiB."""
    max_total_gb: float = Field(100.0, gt=0)
    """Maximum total size of a key's files, including results, in GiB."""
    max_files: int = Field(10_000, ge=1)
    """Maximum number of files per key, including results."""
    min_free_gb: float = Field(1.0, ge=0)
    """Free disk space below which uploads are refused, in GiB."""

    @property
    def max_bytes(self) -> int:
        """Maximum size of a file that is uploaded in one request, in bytes."""
        return self.max_mb * 2**20

    @property
    def max_upload_bytes(self) -> int:
        """Maximum size of a file that is uploaded in parts, in bytes."""
        return int(self.max_upload_gb * 2**30)
