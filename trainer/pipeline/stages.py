"""From a recipe to a registered version, stage by stage; each stage goes on from the files of the one before.

train -> merge -> evaluate (base, merged) -> quantize -> qualify (gptq) -> parity -> judge -> register

Which of them there are follows from the formats that the recipe asks for. What was measured is compared with the
recipe's limits last, so that with other limits nothing is measured again.
"""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from svc.chat_template import TemplateValue, choose_template_kwargs, write_template_kwargs
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.disk import is_full
from svc.engine.capabilities import Capabilities, read_capabilities
from svc.engine.model_facts import read_model_facts
from svc.engine.probes import engine_facts
from svc.errors import DiskSpaceError, InterruptedRunError, SvcError
from svc.evaluation.cache import EvaluationCache
from svc.evaluation.evaluator import judge
from svc.evaluation.general.general_set import MAX_TOKENS
from svc.evaluation.judge import JudgeReport
from svc.evaluation.token_scores import choose_examples
from svc.lock import hold_lock
from svc.model_folder import weight_files
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.housekeeping import size_on_disk
from svc.registry.parity import ParityReport
from svc.registry.registry import Registry
from svc.registry.run_record import MachineRecord, RunRecord
from svc.settings import Settings
from svc.terminal import console
from svc.version import Format, VersionId
from trainer.base_model.content import copy_shipped_files
from trainer.base_model.resolve import Base
from trainer.data.chat_template import tokenize_as_trained
from trainer.data.length import check_served_length
from trainer.estimate.estimate import DeviceEstimate
from trainer.estimate.memory import moment_bytes
from trainer.estimate.real import compare_with_real, estimate_metrics
from trainer.export.gptq import QuantizeSummary, calibration_type, quantize_gptq
from trainer.export.merge import merge_adapter
from trainer.export.verify_merge import MergeSummary, verify_full
from trainer.model.memory import release_memory
from trainer.pipeline.evaluation_cache import evaluation_cache
from trainer.pipeline.evaluation_engine import evaluation_engine
from trainer.pipeline.examples import Examples
from trainer.pipeline.find_base import merged_revision
from trainer.pipeline.forgetting import ForgettingTest
from trainer.pipeline.judging import Judging, compare_answers, judge_endpoint
from trainer.pipeline.number_types import say_number_types
from trainer.pipeline.preflight import check_base
from trainer.pipeline.registration import Registration
from trainer.pipeline.reports import check_reports, open_reports
from trainer.pipeline.run_folder import Run
from trainer.pipeline.stage_failure import stage_failure
from trainer.pipeline.stage_results import Evaluated, Registered
from trainer.pipeline.tracked_run import tracked_run
from trainer.qualification import BaseAnswers, GeneralQuestions, Launch, Qualified, Qualifier
from trainer.recipe.sections import Recipe
from trainer.recipe.stage import Stage, choose_stages
from trainer.training.summary import TrainingData, TrainingSummary

if TYPE_CHECKING:
    from trainer.callbacks.loss_log import Report  # torch with it

_SPARE_BYTES = 200_000_000  # logs, results, the tracking database


@dataclass(frozen=True)
class Pipeline:
    """One run with everything that its stages need.

    Args:
        capabilities: of this device.
        launch: makes engines; default: vLLM processes on this machine.
        register_failed: a version that fails a check is registered all the same, as one that cannot be promoted.
        expected: what training was estimated to take here; None where it was not.
    """

    settings: Settings
    capabilities: Capabilities
    registry: Registry
    recipe: Recipe
    base: Base
    examples: Examples
    run: Run
    launch: Launch | None = None
    register_failed: bool = False
    expected: DeviceEstimate | None = None

    def train_version(self) -> VersionId:
        """Runs what is left to do, and returns the version.

        Raises:
            BusyError: another process works on this run.
            InterruptedRunError: a signal came; the same command goes on.
            SvcError: a stage failed; what was finished before it is kept.
        """
        check_reports(self.recipe.report_to)
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.run.lock, f"the run {self.run.folder.name}"):
            self._forget_if_removed()
            for stage, step in self._stages().items():
                if self.run.done(stage, *step.outputs) and not (stage is Stage.REGISTER and self._is_refused()):
                    console.print(f"[dim]{stage}: done before[/dim]")
                    continue
                self.run.require_space(stage, step.need + _SPARE_BYTES)
                console.print(f"[bold]{stage}[/bold]")
                self.run.begin(stage)
                try:
                    step.work()
                except KeyboardInterrupt as error:
                    raise InterruptedRunError(
                        f"stage {stage} was interrupted",
                        todo="run the same command again: finished stages and checkpoints are kept",
                    ) from error
                except Exception as error:
                    if isinstance(error, SvcError):
                        raise
                    again = "run the same command again: finished stages and checkpoints are kept"
                    if is_full(error, self.run.folder):
                        raise DiskSpaceError(
                            f"no room in {self.run.folder} for what stage {stage} writes: {error}",
                            todo=f"free some space and {again}",
                        ) from error
                    if failure := stage_failure(stage, error, self.run.folder, again):
                        raise failure from error
                    raise
                finally:
                    release_memory()
            return self.run.load(Stage.REGISTER, Registered).version

    def _forget_if_removed(self) -> None:
        if not self.run.done(Stage.REGISTER):
            return
        made = self.run.load(Stage.REGISTER, Registered).version
        if made not in self.registry.versions(made.name):
            console.print(f"{made} was removed: this makes another")
            self.run.forget_registration()

    def _is_refused(self) -> bool:
        """Whether the version was registered as a failed one, which is not asked for now."""
        return bool(self.run.load(Stage.REGISTER, Registered).failed) and not self.register_failed

    @property
    def _full(self) -> bool:
        """Whether there is no adapter: training writes the whole model."""
        return self.recipe.adapter_type is None

    def _stages(self) -> dict[Stage, "_Step"]:
        """The stages that the recipe's formats need: merging and quantizing write no more than the base has.

        A checkpoint of full fine-tuning holds weights in float32 and two moments, with AdamW six times the base in
        bf16. Beside those that are kept there are the one that is being written, and the best. Those of a run that goes
        on are on the disk already.
        """
        size = sum(path.stat().st_size for path in weight_files(self.base.folder))
        kept = self.recipe.checkpoints.keep + 1 + self.recipe.stopping.keep_best
        run = self.run
        checkpoint = int((4 + moment_bytes(self.recipe)) / 2 * size)
        there = size_on_disk(run.checkpoints)
        need = size + max(0, kept * checkpoint - there) if self._full else size // 4
        train = _Step(self._train, need, (self._trained,))
        steps = {
            Stage.TRAIN: train,
            Stage.MERGE: _Step(self._merge, size, (run.merged,)),
            Stage.EVALUATE: _Step(self._evaluate),
            Stage.QUANTIZE: _Step(self._quantize, size, (run.gptq,)),
            Stage.QUALIFY: _Step(self._qualify),
            Stage.PARITY: _Step(self._compare),
            Stage.JUDGE: _Step(self._judge_pairs),
            Stage.REGISTER: _Step(self._register),
        }
        return {stage: steps[stage] for stage in choose_stages(self.recipe)}

    @property
    def _trained(self) -> Path:
        """The folder that training writes."""
        return self.run.merged if self._full else self.run.adapter

    def _train(self) -> TrainingSummary:
        check_base(self.base.folder, self.recipe, self.capabilities, self.settings.engine)
        say_number_types(self.capabilities, self.settings.engine, self.recipe.formats)
        served = self._served_length
        if served is not None:
            room = self.recipe.evaluate.max_tokens or 0
            check_served_length(self._tokenized, served, "held-out", room=room)
            if self._forgetting_test:
                check_served_length(self._forgetting_test.tokenized, served, "general", room=MAX_TOKENS)
            judge_endpoint(self.recipe.judge)
            self._judging.check()
        from trainer.training.sft import train_model  # torch and TRL with it

        tracking, run_id = self.registry.tracking, self._tracking_run()
        tracking.log_parameters(run_id, self.recipe.flat())
        with tracking.attach(run_id), self._report_to() as report:
            summary = train_model(
                self.base.folder,
                TrainingData(self.examples.train, self.examples.heldout, served),
                self.recipe,
                self.run.fresh(self._trained),
                self.run.checkpoints,
                report,
                number_type=self.capabilities.training_type,
            )
        if self.expected is not None:
            summary = compare_with_real(self.expected, summary)
            tracking.log_metrics(run_id, estimate_metrics(summary))
        return self.run.save(Stage.TRAIN, summary)

    @contextmanager
    def _report_to(self) -> Iterator["Report"]:
        """Takes figures to all that the recipe names, as one run in each whatever cuts this one off."""
        parameters, run_id = self.recipe.flat(), self._tracking_run()
        wanted, run = self.recipe.report_to, self.run
        with open_reports(wanted, run.reports, self.recipe.name, run.folder.name, parameters) as reporters:

            def report(step: int, figures: dict[str, float]) -> None:
                self.registry.tracking.log_metrics(run_id, figures, step)
                for reporter in reporters:
                    reporter.log(step, figures)

            yield report

    def _report_evaluations(self, qualified: dict[Format, Qualified]) -> None:
        """The figures of base and formats, at the last step."""
        reports = {format.value: one.evaluation for format, one in qualified.items()}
        if self._evaluated:
            reports["base"] = self._evaluated.base
        figures = {f"exact_match_{name}": report.exact_match.value for name, report in reports.items()}
        figures |= {f"nll_{name}": report.nll.value for name, report in reports.items()}
        if figures:
            with self._report_to() as report:
                report(self.run.load(Stage.TRAIN, TrainingSummary).steps, figures)

    @property
    def _served_length(self) -> int | None:
        """Tokens of the longest prompt with its answer that the engine will take; None where nothing is served."""
        return self._context if {Format.MERGED, Format.GPTQ} & set(self.recipe.formats) else None

    @property
    def _context(self) -> int:
        """Tokens of a prompt with its answer that an engine here accepts."""
        longest = self.settings.engine.max_model_len
        return min(longest, read_model_facts(self.base.folder).context or longest)

    def _merge(self) -> MergeSummary:
        if self._full:
            summary = verify_full(self.base.folder, self.run.merged)
            copy_shipped_files(self.base.folder, self.run.merged)
        else:
            summary = merge_adapter(self.base.folder, self.run.adapter, self.run.fresh(self.run.merged))
        write_template_kwargs(self.run.merged, self._template_kwargs)
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)  # what they led to is verified
        return self.run.save(Stage.MERGE, summary)

    def _evaluate(self) -> Evaluated:
        test, base = self._forgetting_test, self.base
        general = test.prepare(base.revision, base.folder) if test else None
        qualifier, cache = self._qualifier(general), self._cache(base.revision, base.folder)
        known, known_general = cache.find(qualifier.judged, qualifier.limits), general.of_base if general else ()
        if known and known_general is not None:
            console.print("  base: judged before on these examples")
            answers = BaseAnswers(judge(qualifier.judged, known, seconds=0.0), known_general)
            merged = asyncio.run(qualifier.alone(self.run.merged, "merged", general=True))
        else:
            kwargs = self._template_kwargs
            prints = [compatibility_fingerprint(folder, kwargs) for folder in (base.folder, self.run.merged)]
            work = qualifier.base_and_merged(base.folder, self.run.merged, same_fingerprint=prints[0] == prints[1])
            answers, merged = asyncio.run(work)
            cache.add(qualifier.judged, answers.evaluation.results)
            if test:
                test.keep(base.revision, base.folder, answers.general)
        of_base = answers.evaluation
        evaluated = Evaluated(
            base=of_base.report, base_results=of_base.results, base_general=answers.general, merged=merged
        )
        return self.run.save(Stage.EVALUATE, evaluated)

    def _cache(self, revision: str, model: Path) -> EvaluationCache:
        """What a model has answered before, on an engine as it is started now."""
        return evaluation_cache(
            self.settings,
            self.capabilities,
            revision,
            model,
            template_kwargs=self._template_kwargs,
        )

    @property
    def _template_kwargs(self) -> dict[str, TemplateValue]:
        """What the base's chat template is given: the base is asked as its versions are."""
        return choose_template_kwargs(self.base.folder, self.recipe.chat_template_kwargs)

    def _quantize(self) -> QuantizeSummary:
        summary = quantize_gptq(
            self.run.merged,
            self.examples.train,
            self.recipe,
            self.run.fresh(self.run.gptq),
            number_type=self.capabilities.training_type,
        )
        write_template_kwargs(self.run.gptq, self._template_kwargs)
        return self.run.save(Stage.QUANTIZE, summary)

    def _qualify(self) -> Qualified:
        return self.run.save(Stage.QUALIFY, asyncio.run(self._qualifier().alone(self.run.gptq, "gptq")))

    def _compare(self) -> ParityReport:
        from trainer.parity.report import Made, make_report  # torch

        folders = {format: (self.run.folder / format, one.reading) for format, one in self._qualified().items()}
        made = Made(self.base.folder, None if self._full else self.run.adapter, self.run.merged, folders)
        judged = len(self._qualifier().judged)
        number_type = calibration_type(self.capabilities.training_type)
        report = make_report(made, self.recipe, self._compared, judged, number_type=number_type)
        passed = sum(check.passed for check in report.checks)
        found = f"  {passed} of {len(report.checks)} checks passed"
        console.print(found if report.failed else f"{found}: what was trained is what is served")
        return self.run.save(Stage.PARITY, report)

    @property
    def _report(self) -> ParityReport | None:
        """None where nothing is served."""
        return self.run.load(Stage.PARITY, ParityReport) if self._qualified() else None

    def _judge_pairs(self) -> JudgeReport:
        found = self.run.load(Stage.EVALUATE, Evaluated)
        report = compare_answers(self.recipe.judge, self.examples.heldout, found.base_results, found.merged.results)
        return self.run.save(Stage.JUDGE, report)

    def _register(self) -> Registered:
        judging, evaluated, test = self._judging, self._evaluated, self._forgetting_test
        qualified = {format: judging.judge_format(found) for format, found in self._qualified().items()}
        training = self.run.load(Stage.TRAIN, TrainingSummary)
        manifest = Registration(
            registry=self.registry,
            recipe=self.recipe,
            base=self.base,
            examples=self.examples,
            tokenized=self._tokenized,
            run=self.run,
            tracking_run=self._tracking_run(),
            record=self._record(training),
            curve=training.points,
            adapter=None if self._full else self.run.adapter,
            base_evaluation=judging.judge_report(evaluated.base, evaluated.base_results) if evaluated else None,
            base_results=evaluated.base_results if evaluated else (),
            qualified=qualified,
            primary=judging.metrics.primary,
            forgetting=test.compare(evaluated.base_general, evaluated.merged.general) if test and evaluated else None,
            report=self._report,
            judge=self.run.load(Stage.JUDGE, JudgeReport) if Stage.JUDGE in self._stages() else None,
        ).register(failed_too=self.register_failed)
        self._report_evaluations(qualified)
        merged = qualified.get(Format.MERGED)
        if merged:  # for a version that it is the base of
            revision, folder = merged_revision(manifest), self.registry.artifact(manifest.id, Format.MERGED)
            self._cache(revision, folder).add(self._qualifier().judged, merged.results)
            if test:
                test.keep(revision, folder, merged.general)
        registered = self.run.save(
            Stage.REGISTER, Registered(name=manifest.name, number=manifest.number, failed=manifest.failed)
        )
        self.run.clean()
        return registered

    @cached_property
    def _judging(self) -> Judging:
        return Judging(self.examples.heldout, self.recipe.evaluate)

    def _record(self, training: TrainingSummary) -> RunRecord:
        """What the training took, for the version to keep."""
        return RunRecord(
            machine=MachineRecord.of_this_one(),
            number_type=self.capabilities.training_type,
            steps=training.steps,
            tokens=training.tokens,
            tokens_per_second=training.tokens_per_second,
            seconds=training.seconds,
            best_step=training.best_step,
        )

    @cached_property
    def _forgetting_test(self) -> ForgettingTest | None:
        """None where no general questions are asked: by the recipe, or since the base is not judged either."""
        questions = self.examples.questions
        if questions is None or Format.MERGED not in self.recipe.formats:
            return None
        tokenized = tokenize_as_trained(self.base.folder, questions.examples, self._template_kwargs)
        return ForgettingTest(questions, tokenized, self._cache)

    def _qualified(self) -> dict[Format, Qualified]:
        """The formats that can be served."""
        found = {}
        if self._evaluated:
            found[Format.MERGED] = self._evaluated.merged
        if Format.GPTQ in self.recipe.formats:
            found[Format.GPTQ] = self.run.load(Stage.QUALIFY, Qualified)
        return found

    @property
    def _evaluated(self) -> Evaluated | None:
        """What was found of base and merged model; None where they are not asked for."""
        return self.run.load(Stage.EVALUATE, Evaluated) if Format.MERGED in self.recipe.formats else None

    def _qualifier(self, general: GeneralQuestions | None = None) -> Qualifier:
        facts = partial(engine_facts, self.settings.engine, self.capabilities)
        launch = self.launch or partial(
            evaluation_engine,
            settings=self.settings,
            capabilities=self.capabilities,
            run=self.run.folder,
            name=self.recipe.name,
            template_kwargs=self._template_kwargs,
        )
        heldout = self.examples.heldout
        parts = (launch, facts, self.recipe, heldout, self._tokenized, self._compared, general)
        return Qualifier(*parts, context=self._context)

    @property
    def _compared(self) -> list[TokenizedExample]:
        """Those that are compared token by token."""
        return choose_examples(self._tokenized[: self.recipe.evaluate.limit])

    @cached_property
    def _tokenized(self) -> list[TokenizedExample]:
        """The held-out examples as they are trained on."""
        return tokenize_as_trained(self.base.folder, self.examples.heldout, self._template_kwargs)

    def _tracking_run(self) -> str:
        """The MLflow run of this folder."""
        tags = {"tuneserve.run": self.run.folder.name, "tuneserve.base": self.base.origin}
        return tracked_run(self.run.tracking, lambda: self.registry.tracking.start_run(self.recipe.name, tags))


@dataclass(frozen=True, slots=True)
class _Step:
    """One stage.

    Attributes:
        need: bytes that it may write.
        outputs: folders that it writes.
    """

    work: Callable[[], object]
    need: int = 0
    outputs: tuple[Path, ...] = ()


def open_pipeline(
    settings: Settings,
    registry: Registry,
    recipe: Recipe,
    examples: Examples,
    base: Base,
    *,
    register_failed: bool = False,
    expected: DeviceEstimate | None = None,
) -> Pipeline:
    """The pipeline of a recipe, in the folder where an earlier try of it lies."""
    run, capabilities = Run.of(settings.home / "runs", recipe, base, examples), read_capabilities(settings.home)
    parts = (settings, capabilities, registry, recipe, base, examples, run)
    return Pipeline(*parts, register_failed=register_failed, expected=expected)
