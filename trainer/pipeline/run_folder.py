"""A training run's folder on disk, which records the progress of the run's stages.

    $SVC_HOME/runs/NAME-KEY/   train.json  adapter/  merge.json  merged/  evaluate.json  ...

A stage is done if its result file exists and contains the key of the stage's current input. The file is
written last and atomically, so an interrupted stage is repeated from its start, and a finished stage is
not repeated. The folder is named after the key of the training stage, so recipes with the same training
share a folder.

A stage that ran on another machine leaves its weights in the object store. Its result file then contains the records of
these weights.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter

from svc.errors import DiskSpaceError, IntegrityError
from svc.files.disk import sync_files, write_whole
from svc.files.json_file import read_json_object
from svc.registry.files import FileRecord
from svc.version import Format
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples
from trainer.pipeline.stage_key import StageKeys, stage_keys
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import Stage

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class StoredWeights(BaseModel):
    """Weights in the object store that a stage wrote on another machine.

    Attributes:
        files: the files, with paths relative to the run's folder.
        fingerprint: fingerprint of the weights (svc.registry.fingerprint), or None for weights that the engine does not
            load.
    """

    model_config = ConfigDict(frozen=True)

    files: tuple[FileRecord, ...]
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class RemoteResult:
    """Result of a stage that ran on another machine.

    Attributes:
        weights: weights that the stage wrote to the object store, or None if it wrote none.
    """

    result: object
    weights: StoredWeights | None = None


class Run:
    """A training run's folder.

    Args:
        folder: run folder, created when the run starts.
        keys: the key of each stage's current input.

    Attributes:
        adapter: the trained adapter.
        merged: the merged model.
        checkpoints: checkpoints from which interrupted training is resumed.
        reference: reference data with which later traffic is compared.
        reports: files of the trackers in `report_to` other than MLflow.
        tracking: file with the id of the MLflow run.
        lock: lock held by the process that is working on the run.
    """

    def __init__(self, folder: Path, keys: StageKeys) -> None:
        self.folder = folder
        self._keys = keys
        self._weights = [self.weights(format) for format in Format]
        self.adapter, self.merged = self.weights(Format.ADAPTER), self.weights(Format.MERGED)
        self.checkpoints, self.reference = folder / "checkpoints", folder / "reference"
        self.reports, self.tracking, self.lock = folder / "reports", folder / "mlflow.json", folder / "lock"

    @classmethod
    def of(cls, runs: Path, recipe: Recipe, base: Base, examples: Examples, trained: str | None = None) -> "Run":
        """Return a recipe's run. Recipes that share a name and train identically share a run folder, even if their
        formats differ.

        Args:
            trained: hash of an adapter that was trained elsewhere.
        """
        keys = stage_keys(recipe, base, examples, trained)
        return cls(runs / f"{recipe.name}-{keys[Stage.TRAIN]}", keys)

    def weights(self, format: Format) -> Path:
        """Return the folder that contains the weights in the given format."""
        return self.folder / format

    def done(self, stage: Stage, *outputs: Path) -> bool:
        """Return whether a stage has finished and its input has not changed since.

        Args:
            outputs: folders that the stage wrote and that are still needed.
        """
        try:
            stored = read_json_object(self._result(stage), default={})
        except IntegrityError:  # after a power cut, or written by another program: the stage is repeated
            log.warning("cannot read %s; repeating the stage", self._result(stage), exc_info=True)
            return False
        return stored.get("key") == self._keys[stage] and all(output.is_dir() for output in outputs)

    def stored_weights(self, stage: Stage) -> StoredWeights | None:
        """Return the weights of a finished stage that are in the object store, or None if there are none."""
        if not self.done(stage):
            return None
        stored = read_json_object(self._result(stage)).get("stored")
        return None if stored is None else StoredWeights.model_validate(stored)

    def add_stored(self, stage: Stage, weights: StoredWeights | None) -> None:
        """Record where a finished stage's weights are.

        Args:
            weights: the weights in the object store, or None if they are in the run's folder.
        """
        stored = weights.model_dump(mode="json") if weights else None
        content = read_json_object(self._result(stage)) | {"stored": stored}
        write_whole(self._result(stage), json.dumps(content, indent=1).encode("utf-8"))

    def at(self, folder: Path) -> "Run":
        """Return the same run with a different run folder."""
        return Run(folder, self._keys)

    def copy_results(self, results: Mapping[Stage, bytes]) -> None:
        """Copy into this run the results of stages that ran elsewhere, as returned by `results`."""
        for stage, content in results.items():
            write_whole(self._result(stage), content)

    def results(self) -> dict[Stage, bytes]:
        """Return the contents of the result files of all finished stages."""
        return {stage: self._result(stage).read_bytes() for stage in Stage if self.done(stage)}

    def begin(self, stage: Stage) -> None:
        """Mark a stage as unfinished. This is called before its outputs are overwritten."""
        self._result(stage).unlink(missing_ok=True)

    def save(self, stage: Stage, result: Result) -> Result:
        """Save a stage's result, which marks the stage as finished, and return the result.

        Args:
            result: a dataclass or a pydantic model, or the result of a stage that ran on another machine.
        """
        value, weights = (result.result, result.weights) if isinstance(result, RemoteResult) else (result, None)
        for folder in self._weights:
            if folder.is_dir():
                sync_files(folder)  # a stage is not done before its outputs would survive a power cut
        stored = {"key": self._keys[stage], "result": TypeAdapter(type(value)).dump_python(value, mode="json")}
        if weights is not None:
            stored["stored"] = weights.model_dump(mode="json")
        write_whole(self._result(stage), json.dumps(stored, indent=1).encode("utf-8"))
        return result

    def load(self, stage: Stage, kind: type[Result]) -> Result:
        """Load the result of a finished stage."""
        return TypeAdapter(kind).validate_python(read_json_object(self._result(stage))["result"])

    def fresh(self, folder: Path) -> Path:
        """Delete a folder that an interrupted stage may have left behind, and return its path."""
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def forget_registration(self) -> None:
        """Allow the run to register its version again, in a new MLflow run, after the registered version was
        removed.
        """
        for path in (self._result(Stage.REGISTER), self.tracking):
            path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove folders that are no longer needed after registration.

        Weights that are hard links to the registry's files take no extra space and are kept, so that a later
        recipe can quantize again without training. Other weights are removed.
        """
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder != self.reports and (folder not in self._weights or not _is_linked(folder)):
                shutil.rmtree(folder)

    def require_space(self, stage: Stage, need: int) -> None:
        """Check that there is enough free disk space before a stage starts.

        Args:
            need: number of bytes that the stage writes.

        Raises:
            DiskSpaceError: the disk has less free space than the stage needs.
        """
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise DiskSpaceError(
                f"stage {stage} needs {need / 1e6:.0f} MB in {self.folder}, but only {free / 1e6:.0f} MB are free",
                todo=f"free up {(need - free) / 1e6:.0f} MB or set SVC_HOME to another disk; finished stages are kept",
            )

    def _result(self, stage: Stage) -> Path:
        return self.folder / f"{stage}.json"


def _is_linked(folder: Path) -> bool:
    """Return whether every weight file in a folder has a second hard link."""
    files = (path for suffix in ("safetensors", "gguf") for path in folder.glob(f"*.{suffix}"))
    return all(path.stat().st_nlink > 1 for path in files)
