"""Creates versions with all their files and given answers."""

import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.evaluation.evaluator import Evaluation, score_answers
from svc.evaluation.results import ExampleResult, write_results
from svc.registry.files import record_files
from svc.registry.manifest import DataRecord, FormatRecord, Manifest
from svc.registry.registry import BASE_RESULTS_FILE, HELDOUT_FILE, REFERENCE_FOLDER, Registry
from svc.version import Format, VersionId
from tests.svc.chats import chat
from tests.svc.registry.manifests import make_manifest
from tests.svc.registry.model_folder import write_model
from tests.svc.registry.parity import make_parity
from trainer.data.summary import DATA_SUMMARY_FILE, summarize_data
from trainer.model.run_record import RUN_RECORD_FILE, MachineRecord, RunRecord
from trainer.report.judged import BASE, Judged
from trainer.training_curve import TRAINING_CURVE_FILE, TrainingPoint, write_training_curve

MACHINE = MachineRecord(processor="Some CPU", cores=2, memory=2**33, gpus=(), system="Linux 6.1", python="3.11.2")
RUN = RunRecord(
    machine=MACHINE, number_type="bfloat16", steps=80, tokens=40_000, tokens_per_second=250.0, seconds=160.0
)


def curve(steps: int = 80) -> list[TrainingPoint]:
    """Return a curve of falling loss, with a held-out loss at every tenth step."""
    return [
        TrainingPoint(
            step=step,
            epoch=step / steps,
            loss=None if step == 0 else 0.4 + 2.5 * math.exp(-step / 12) + 0.1 * math.sin(step * 2.4),
            heldout_loss=0.5 + 2.4 * math.exp(-step / 12) if step % 10 == 0 else None,
            learning_rate=None if step == 0 else 5e-4 * (1 - step / steps),
            grad_norm=None if step == 0 else 1.0,
        )
        for step in range(steps + 1)
    ]


def answer(text: str, reference: str, nll: float = 1.0) -> ExampleResult:
    """Return the result for one answer."""
    hit = text.strip() == reference.strip()
    return ExampleResult(
        answer=text,
        tokens=len(text) // 4 + 1,
        limit=1000,
        finish_reason="stop",
        logprob=-0.5,
        nll=nll,
        scored=4,
        hit=hit,
    )


def evaluation(examples: Sequence[ChatExample], answers: Sequence[str], nlls: Sequence[float] = ()) -> Evaluation:
    """Return the evaluation of the answers, using the metrics of the task."""
    nll = itertools.chain(nlls, itertools.repeat(1.0))
    results = [answer(text, one.answer, next(nll)) for one, text in zip(examples, answers, strict=True)]
    return score_answers(examples, results, 2.0)


@dataclass(frozen=True)
class JudgedVersions:
    """Publishes versions with given answers.

    Args:
        name: name of the model.
        run: id of an MLflow run.
    """

    registry: Registry
    name: str
    run: str

    def publish(
        self,
        examples: Sequence[ChatExample],
        answers: Mapping[str, Sequence[str]],
        *,
        nlls: Mapping[str, Sequence[float]] | None = None,
        train: Sequence[ChatExample] = (),
        judged: int | None = None,
        **changes: Any,
    ) -> Manifest:
        """Publish a version.

        Args:
            answers: answers of the base, merged and gptq models that were judged.
            nlls: NLLs of the references, by model.
            train: training examples; by default the same as `examples`.
            judged: number of examples that were asked; all by default.
            changes: changes to the manifest.
        """
        found = {
            model: evaluation(examples[:judged], texts[:judged], (nlls or {}).get(model, ()))
            for model, texts in answers.items()
        }
        with tempfile.TemporaryDirectory() as folder:
            made = partial(self._manifest, judged=found, count=len(examples), changes=changes)
            content = self._content(Path(folder), examples, found, train or examples)
            return self.registry.publish(self.name, self.run, content, made)

    def _content(
        self,
        folder: Path,
        examples: Sequence[ChatExample],
        judged: Mapping[str, Evaluation],
        train: Sequence[ChatExample],
    ) -> dict[str, Path]:
        write_examples(folder / HELDOUT_FILE, examples)
        reference = folder / REFERENCE_FOLDER
        reference.mkdir()
        for model, found in judged.items():
            write_results(reference / (BASE_RESULTS_FILE if model == BASE else f"{model}.jsonl"), found.results)
        write_training_curve(reference / TRAINING_CURVE_FILE, curve())
        (reference / DATA_SUMMARY_FILE).write_text(summarize_data(train, examples).model_dump_json(), "utf-8")
        (reference / RUN_RECORD_FILE).write_text(RUN.model_dump_json(), "utf-8")
        formats = {format for format in Format if format in judged} or {Format.ADAPTER}
        content = {format.value: write_model(folder / "work" / format) for format in formats}
        return {**content, HELDOUT_FILE: folder / HELDOUT_FILE, REFERENCE_FOLDER: reference}

    def _manifest(
        self,
        version: VersionId,
        folder: Path,
        judged: Mapping[str, Evaluation],
        count: int,
        changes: Mapping[str, Any],
    ) -> Manifest:
        reports = {model: found.report for model, found in judged.items()}
        formats = {
            format: FormatRecord(
                files=record_files(folder, folder / format),
                evaluation=reports.get(format),
                load_seconds=0.3,
                tokens_per_second=150.0,
            )
            for format in Format
            if (folder / format).is_dir()
        }
        data = DataRecord(
            train_fingerprint="sha256:1", train_examples=count, heldout_fingerprint="sha256:2", heldout_examples=count
        )
        values = {
            "formats": formats,
            "base_evaluation": reports.get(BASE),
            "data": data,
            "parity": make_parity(),
            "recipe": {"name": version.name, "train": {"epochs": 1.0}},
        }
        return make_manifest(version, folder, **(values | dict(changes)))


LABELS = [chat(f"q {place}", ("net", "games", "java")[place % 3]) for place in range(60)]
TEXTS = [chat(f"q {place}", f"a tool that does number {place} of all things") for place in range(30)]


def judged(
    examples: Sequence[ChatExample], answers: Mapping[str, Sequence[str]], *, kept: Sequence[str] | None = None
) -> Judged:
    """Return the judged data for these answers.

    Args:
        kept: models whose answers are known; all by default.
    """
    made = {model: evaluation(examples, texts) for model, texts in answers.items()}
    return Judged(
        examples,
        {model: one.report for model, one in made.items()},
        {model: one.results for model, one in made.items() if kept is None or model in kept},
    )


def right(examples: Sequence[ChatExample], count: int) -> list[str]:
    """Return answers, the first `count` of which are right."""
    return [one.answer if place < count else "none of them" for place, one in enumerate(examples)]
