"""The stages between training and registration, which create and evaluate a version's formats.

These stages need the device on which versions are evaluated, but not the registry, the tracking server or the recipe's
files. They can therefore run on another machine (trainer.pipeline.ray_stages).
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from svc.dataset.schema.example import ChatExample
from svc.engine.device import DeviceCapabilities, NumberType
from svc.engine.model_facts import ModelFacts
from svc.engine.vllm.number_type import AWQ, COMPRESSED_TENSORS, GPTQ, choose_dtype, explain_gptq_kernel
from svc.model_folder.chat_template import write_template_kwargs
from svc.model_folder.weight_files import weight_files
from svc.registry.parity import ParityReport
from svc.settings.engine import EngineSettings
from svc.terminal import console
from svc.version import QUANTIZED_FORMATS, Format
from trainer.base_model.content import copy_shipped_files
from trainer.export.eight_bits import RoundingSummary, quantize_to_8_bits
from trainer.export.gguf.writer import GgufSummary, check_gguf, export_gguf
from trainer.export.gptq import QuantizeSummary, calibration_type, quantize_to_4_bits
from trainer.export.merge import merge_adapter
from trainer.export.verify_merge import MergeSummary, verify_full
from trainer.pipeline.evaluation import RunEvaluation
from trainer.pipeline.preflight import check_base
from trainer.pipeline.run_folder import Run
from trainer.pipeline.run_stages import Step
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import QUALIFY_STAGES, QUANTIZE_STAGES, Stage

_METHODS = {Format.GPTQ: GPTQ, Format.AWQ: AWQ, Format.INT8: COMPRESSED_TENSORS, Format.FP8: COMPRESSED_TENSORS}
"""Quantization method named in the config of each quantized format."""


def say_number_types(able: DeviceCapabilities, engine: EngineSettings, formats: Sequence[Format]) -> None:
    """Print the data type chosen for training, and the one for serving each format on this machine, with reasons.

    Args:
        able: capabilities of this machine.
        formats: the recipe's formats.

    Raises:
        EngineError: a quantized format cannot be served on this machine.
    """
    served = able.device(engine)
    _say("train", f"{able.training_type} on {able.training_device}", able.training_reason)
    for format in formats:
        if format is Format.ADAPTER:
            continue
        quantization = _METHODS.get(format)
        dtype = choose_dtype(engine, able, ModelFacts(dtype=NumberType.BFLOAT16, quantization=quantization))
        if format in (Format.GPTQ, Format.AWQ):
            kernel = explain_gptq_kernel(engine, able)
            _say(format, f"{dtype.value} on {served}, {kernel.value} kernel", kernel.reason)
            continue
        _say(format, f"{dtype.value} on {served}", dtype.reason)
        if format in (Format.INT8, Format.FP8) and (warning := able.check_eight_bits(format, engine)):
            console.print(f"[yellow]  {warning}[/yellow]", soft_wrap=True)


def _say(use: str, choice: str, reason: str) -> None:
    console.print(f"  {use}: {choice}" + (f" ({reason})" if reason else ""))


@dataclass(frozen=True)
class ModelStages:
    """The stages that create, evaluate and compare a run's formats.

    Args:
        evaluation: the run's evaluation, which specifies the run's folder, the base and the device.
        calibration: training examples on which 4-bit formats are calibrated.
    """

    recipe: Recipe
    evaluation: RunEvaluation
    calibration: Sequence[ChatExample]

    @property
    def steps(self) -> dict[Stage, Step]:
        """The stages and their disk space requirements. A stage writes at most one model, no larger than the base."""
        run, size = self._run, sum(path.stat().st_size for path in weight_files(self._base))
        steps = {
            Stage.MERGE: Step(self._merge, size, (run.merged,)),
            Stage.EVALUATE: Step(self.evaluation.evaluate),
            Stage.EXPORT_GGUF: Step(self._export_gguf, size, (run.weights(Format.GGUF),)),
            Stage.PARITY: Step(self._compare),
        }
        for format in QUANTIZED_FORMATS:
            quantize, qualify = partial(self._quantize, format), partial(self.evaluation.qualify_quantized, format)
            steps[QUANTIZE_STAGES[format]] = Step(quantize, size, (run.weights(format),))
            steps[QUALIFY_STAGES[format]] = Step(qualify)
        return steps

    def check(self) -> None:
        """Check before training that this machine can create and evaluate each format of the base.

        Raises:
            SvcError: see `check_base`, `say_number_types` and `check_gguf`.
        """
        capabilities, engine, formats = (
            self.evaluation.capabilities,
            self.evaluation.settings.engine,
            self.recipe.formats,
        )
        check_base(self._base, self.recipe, capabilities, engine)
        say_number_types(capabilities, engine, formats)
        if Format.GGUF in formats:
            check_gguf(self._base, self.evaluation.template_kwargs, self.evaluation.heldout)

    @property
    def _run(self) -> Run:
        return self.evaluation.run

    @property
    def _base(self) -> Path:
        return self.evaluation.base.folder

    @property
    def is_full(self) -> bool:
        """Whether training writes the complete model instead of an adapter."""
        return self.recipe.adapter_type is None

    def _merge(self) -> MergeSummary:
        run = self._run
        if self.is_full:
            summary = verify_full(self._base, run.merged)
            copy_shipped_files(self._base, run.merged)
        else:
            merged, dequantized = run.fresh(run.merged), self.recipe.merge_dequantized
            summary = merge_adapter(self._base, run.adapter, merged, dequantized=dequantized)
        write_template_kwargs(run.merged, self.evaluation.template_kwargs)
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # the trained model is verified
        return summary

    def _quantize(self, format: Format) -> QuantizeSummary | RoundingSummary:
        merged, out = self._run.merged, self._run.fresh(self._run.weights(format))
        summary: QuantizeSummary | RoundingSummary
        if format in (Format.GPTQ, Format.AWQ):
            number_type = self.evaluation.capabilities.training_type
            summary = quantize_to_4_bits(format, merged, self.calibration, self.recipe, out, number_type=number_type)
        else:
            summary = quantize_to_8_bits(merged, out, format)
        write_template_kwargs(out, self.evaluation.template_kwargs)
        return summary

    def _export_gguf(self) -> GgufSummary:
        out, examples = self._run.fresh(self._run.weights(Format.GGUF)), self.evaluation.heldout
        return export_gguf(self._run.merged, out, self.recipe.name, examples)

    def _compare(self) -> ParityReport:
        from trainer.evaluation.parity.report import BESIDE_NF4, Made, make_report  # torch

        evaluation, run = self.evaluation, self._run
        folders = {
            format: (run.weights(format), qualified.reading) for format, qualified in evaluation.qualified.items()
        }
        made = Made(self._base, None if self.is_full else run.adapter, run.merged, folders)
        evaluated = len(evaluation.heldout[: evaluation.options.limit])
        number_type = calibration_type(evaluation.capabilities.training_type)
        report = make_report(made, self.recipe, evaluation.compared, evaluated, number_type=number_type)
        passed = sum(check.passed for check in report.checks)
        summary = f"  {passed} of {len(report.checks)} checks passed"
        console.print(summary if report.failed else f"{summary}: the model to serve matches the trained model")
        if gap := report.differences.get(BESIDE_NF4):
            console.print(
                "  adapter on the base's original weights, compared with the NF4 weights it was trained on: negative "
                f"log-likelihood {gap.shift:+.4f} nats per token, same top-1 token at {gap.agreement:.1%} of positions",
                soft_wrap=True,
            )
        return report
