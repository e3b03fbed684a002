"""One training run on disk: its folder, its stages, and how far it came.

    $SVC_HOME/runs/NAME-KEY/   train.json  adapter/  merge.json  merged/  evaluate.json  ...

A stage is done when its result file is there with the key of what the stage reads now; it is written last and
atomically, so a stage that was interrupted is done again from its start, and none that was finished is. The folder's
key is that of training: recipes that train the same share it.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from svc.errors import DiskSpaceError, IntegrityError
from svc.files.disk import sync_files, write_whole
from svc.files.json_file import read_json_object
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples
from trainer.pipeline.stage_key import StageKeys, stage_keys
from trainer.recipe.sections import Recipe
from trainer.recipe.stage import Stage

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Run:
    """A run's folder.

    Args:
        folder: made when the run starts.
        keys: of what each stage reads now.

    Attributes:
        adapter: the trained adapter.
        merged: the merged model.
        gptq: the quantized model.
        checkpoints: what an interrupted training goes on from.
        reference: what the version is compared with later.
        reports: what the recipe's `report_to` writes beside MLflow.
        tracking: file that names the run of MLflow.
        lock: held while somebody works on the run.
    """

    def __init__(self, folder: Path, keys: StageKeys) -> None:
        self.folder = folder
        self._keys = keys
        self.adapter, self.merged, self.gptq = self._weights = folder / "adapter", folder / "merged", folder / "gptq"
        self.checkpoints, self.reference = folder / "checkpoints", folder / "reference"
        self.reports, self.tracking, self.lock = folder / "reports", folder / "mlflow.json", folder / "lock"

    @classmethod
    def of(cls, runs: Path, recipe: Recipe, base: Base, examples: Examples) -> "Run":
        """The run that a recipe means: one folder for each training, whatever is made of it afterwards."""
        keys = stage_keys(recipe, base, examples)
        return cls(runs / f"{recipe.name}-{keys[Stage.TRAIN]}", keys)

    def done(self, stage: Stage, *outputs: Path) -> bool:
        """Whether a stage was finished, from what it would read now.

        Args:
            outputs: folders that it wrote and that are needed still.
        """
        try:
            said = read_json_object(self._result(stage), default={})
        except IntegrityError:  # of a power cut, or of nobody here: it is done again
            log.warning("%s cannot be read: the stage is done again", self._result(stage), exc_info=True)
            return False
        return said.get("key") == self._keys[stage] and all(output.is_dir() for output in outputs)

    def begin(self, stage: Stage) -> None:
        """Marks a stage as not finished, before what it wrote is written anew."""
        self._result(stage).unlink(missing_ok=True)

    def save(self, stage: Stage, result: Result) -> Result:
        """Marks a stage as finished.

        Args:
            result: a dataclass or a pydantic model.
        """
        for folder in self._weights:
            if folder.is_dir():
                sync_files(folder)  # a stage is not done before what it made would survive a power cut
        said = {"key": self._keys[stage], "result": TypeAdapter(type(result)).dump_python(result, mode="json")}
        write_whole(self._result(stage), json.dumps(said, indent=1).encode("utf-8"))
        return result

    def load(self, stage: Stage, kind: type[Result]) -> Result:
        """The result of a finished stage."""
        return TypeAdapter(kind).validate_python(read_json_object(self._result(stage))["result"])

    def fresh(self, folder: Path) -> Path:
        """Removes what an interrupted stage left in a folder, and returns the folder's path."""
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def forget_registration(self) -> None:
        """Lets the version be registered anew, in an MLflow run of its own: what was registered has been removed."""
        for path in (self._result(Stage.REGISTER), self.tracking):
            path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Removes what nobody needs once the version is registered.

        Weights that are one file with the registry's cost nothing, and let a later recipe quantize anew without
        training; others go.
        """
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder != self.reports and (folder not in self._weights or not _is_linked(folder)):
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


def _is_linked(folder: Path) -> bool:
    """Whether all of its weights have another name elsewhere."""
    return all(path.stat().st_nlink > 1 for path in folder.glob("*.safetensors"))
