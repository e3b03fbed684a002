"""The progress of a training run, as a file of JSON lines.

`svc train --progress FILE` writes it, and the fine-tuning worker reads it while the training runs. A resumed run
appends to the file, so a repeated step appears twice; the last line for a step is the valid one.
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

EPOCHS_FOLDER = "epochs"
"""Name of the folder that contains the adapters saved after the last few epochs. The folder is next to the progress
file."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class StageBegun(_Record):
    """Progress record: a stage of `svc train` has begun, for example the merge."""

    kind: Literal["stage"] = "stage"
    name: str


class StepDone(_Record):
    """Progress record: an optimizer step is complete.

    Attributes:
        steps: total number of steps in the training run.
        epoch: number of epochs trained so far, including the fraction of the current one.
        loss: mean loss per token of the step's batch, in nats.
        accuracy: share of the batch's trained tokens that were the model's top-1 prediction, or None if not measured.
        tokens: number of tokens trained on so far.
        left_s: estimated remaining training time in seconds, or None if not known yet.
    """

    kind: Literal["step"] = "step"
    step: int
    steps: int
    epoch: float
    loss: float
    accuracy: float | None = None
    tokens: int
    left_s: float | None = None


class HeldoutLoss(_Record):
    """Progress record: the held-out examples have been evaluated after a step. `loss` and `accuracy` are as in
    `StepDone`.
    """

    kind: Literal["heldout"] = "heldout"
    step: int
    loss: float
    accuracy: float | None = None


class EpochSaved(_Record):
    """Progress record: the adapter at the end of an epoch has been saved for clients.

    Attributes:
        folder: folder on this machine that contains the adapter.
    """

    kind: Literal["saved"] = "saved"
    step: int
    folder: str


class Registered(_Record):
    """Progress record: the version has been registered. This is the last record.

    Attributes:
        version: `NAME@N`.
    """

    kind: Literal["registered"] = "registered"
    version: str


ProgressRecord = Annotated[StageBegun | StepDone | HeldoutLoss | EpochSaved | Registered, Field(discriminator="kind")]
_RECORD: TypeAdapter[ProgressRecord] = TypeAdapter(ProgressRecord)


class ProgressFile:
    """Writes progress to a file, which is created if it does not exist.

    Args:
        path: the progress file, whose folder must exist.

    Attributes:
        path: the progress file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: ProgressRecord) -> None:
        """Append a record. A reader never sees part of a record."""
        with self.path.open("ab", buffering=0) as file:
            file.write(record.model_dump_json().encode() + b"\n")


class ProgressReader:
    """Reads a progress file while it is written.

    Args:
        path: the file, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[ProgressRecord]:
        """Return the records since the last call. An incomplete last line is left for the next call.

        Lines that are not valid records are skipped, because a full disk may cut off a line.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        records = list[ProgressRecord]()
        for line in complete.splitlines():
            with suppress(ValidationError):
                records.append(_RECORD.validate_json(line))
        return records
