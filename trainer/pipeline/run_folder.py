"""One training run on disk: its folder, its stages, and how far it came.

    $SVC_HOME/runs/NAME-KEY/   train.json  adapter/  merge.json  merged/  evaluate.json  ...

A stage is done when its result file is there; it is written last and atomically, so a stage that was interrupted is
done again from its start, and none that was finished is. The key is made of all that decides the result, so the same
recipe on the same data is the same run.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from svc.dataset.checks.check import shared_prompts
from svc.dataset.fingerprint import fingerprint
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.split import mix_general, near_leaks, split_heldout
from svc.disk import sync_files, write_whole
from svc.errors import DataError, DiskSpaceError
from svc.terminal import console
from trainer.base_model.resolve import Base
from trainer.recipe.sections import Data, Recipe

Result = TypeVar("Result")


class Stage(StrEnum):
    """The stages, in their order."""

    TRAIN = "train"
    MERGE = "merge"
    EVALUATE = "evaluate"
    QUANTIZE = "quantize"
    QUALIFY = "qualify"
    REGISTER = "register"


@dataclass(frozen=True, slots=True)
class Examples:
    """What is trained on and judged by, and their fingerprints.

    Attributes:
        train: the task's examples, then the general ones.
        general: how many of `train`, at its end, are general.
    """

    train: tuple[ChatExample, ...]
    heldout: tuple[ChatExample, ...]
    train_fingerprint: str
    heldout_fingerprint: str
    general: int = 0


def read_run_examples(recipe: Recipe, *, cache: Path | None = None, bad_lines: BadLines | None = None) -> Examples:
    """Reads a recipe's data.

    Args:
        cache: folder for datasets of the hub.
        bad_lines: takes lines that cannot be trained on, leaks among them; without it the first one stops the run.

    Raises:
        DataError: a file that cannot be trained on; names file and line.
    """
    data = recipe.data
    read = partial(read_examples, cache=cache, bad_lines=bad_lines)
    heldout = read(data.heldout) if data.heldout else []
    readable = read(data.train, minimum=2 if heldout else 3, kept_back=heldout if bad_lines else ())
    if not heldout:
        readable, heldout = split_heldout(readable, data.heldout_share, data.seed)
    train = readable[data.skip :][: data.limit]
    if len(train) < 2:
        raise DataError(
            f"data.skip {data.skip} leaves {len(train)} of {len(readable)} examples in {', '.join(data.train)}",
            expected="at least 2",
            todo="lower data.skip",
        )
    _refuse_leaks(data, train, heldout)
    general = mix_general(train, read(data.general), heldout, data.general_share, data.seed) if data.general else []
    whole = (*train, *general)
    return Examples(whole, tuple(heldout), fingerprint(whole), fingerprint(heldout), len(general))


def _refuse_leaks(data: Data, train: list[ChatExample], heldout: list[ChatExample]) -> None:
    """Examples that are held out stop a run; examples that are nearly held out are told."""
    check = f"svc data check {' '.join(data.train)} --heldout {' '.join(data.heldout or ())}"
    leaked = shared_prompts(train, heldout)
    if leaked:
        raise DataError(
            f"{len(leaked)} training examples have the prompt of a held-out one, the first is number {leaked[0] + 1}",
            expected="a held-out set that is never trained on: else its figures mean nothing",
            todo=f"{check}, and drop those lines; or train with --skip-bad",
        )
    if data.heldout and (near := near_leaks(train, heldout)):
        console.print(f"[yellow]{len(near)} training examples ask nearly the same as a held-out one: {check}[/yellow]")


class Run:
    """A run's folder.

    Args:
        folder: made when the run starts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, runs: Path, recipe: Recipe, base: Base, examples: Examples) -> "Run":
        """The run that a recipe means, on this data and this base; how often it is saved makes no other run."""
        paths = {"train", "heldout", "general"}
        decides = recipe.model_dump(mode="json", exclude={"data": paths, "base": True, "checkpoints": True})
        decides["fingerprints"] = [base.revision, examples.train_fingerprint, examples.heldout_fingerprint]
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        return cls(runs / f"{recipe.name}-{key}")

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What an interrupted training goes on from."""
        return self.folder / "checkpoints"

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.folder / "merged"

    @property
    def gptq(self) -> Path:
        """The quantized model."""
        return self.folder / "gptq"

    @property
    def reference(self) -> Path:
        """What the version is compared with later."""
        return self.folder / "reference"

    @property
    def tracking(self) -> Path:
        """Says which run of MLflow it is."""
        return self.folder / "mlflow.json"

    @property
    def lock(self) -> Path:
        """Held while somebody works on the run."""
        return self.folder / "lock"

    def done(self, stage: Stage) -> bool:
        """Whether a stage was finished."""
        return self._result(stage).is_file()

    def save(self, stage: Stage, result: Result) -> Result:
        """Marks a stage as finished.

        Args:
            result: a dataclass or a pydantic model.
        """
        for folder in (self.adapter, self.merged, self.gptq):
            if folder.is_dir():
                sync_files(folder)  # a stage is not done before what it made would survive a power cut
        write_whole(self._result(stage), TypeAdapter(type(result)).dump_json(result, indent=1))
        return result

    def load(self, stage: Stage, kind: type[Result]) -> Result:
        """The result of a finished stage."""
        return TypeAdapter(kind).validate_json(self._result(stage).read_bytes())

    def fresh(self, folder: Path) -> Path:
        """Removes what an interrupted stage left in a folder, and returns the folder's path."""
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def reset(self) -> None:
        """Lets every stage be done again: what was finished led to a version that was removed."""
        for path in (*map(self._result, Stage), self.tracking):
            path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Removes the weights, which the registry has now, and keeps the results and logs."""
        for folder in self.folder.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)

    def require_space(self, stage: Stage, need: int) -> None:
        """Checks for room before a stage starts.

        Args:
            need: bytes that the stage writes.

        Raises:
            DiskSpaceError: says how much is missing, and where.
        """
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise DiskSpaceError(
                f"stage {stage} needs {need / 1e6:.0f} MB in {self.folder}, {free / 1e6:.0f} MB are free",
                todo=f"free {(need - free) / 1e6:.0f} MB or set SVC_HOME to another disk; what is done is kept",
            )

    def _result(self, stage: Stage) -> Path:
        return self.folder / f"{stage}.json"
