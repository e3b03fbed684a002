"""Provides a registry with versions that are created in a millisecond, with the engine double's probes."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from svc.dataset.prompt_hashes import NO_PROMPTS, TRAINED_PROMPTS_FILE, write_prompt_hashes
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import write_tokenized
from svc.drift_reference.drift_sample import DRIFT_SAMPLE_FILE
from svc.drift_reference.text_embedding import TEXT_SPACE_FILE, fit_text_space, save_text_space
from svc.engine.probes import EngineFacts, Probe
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.intervals import Interval, proportion
from svc.evaluation.results import ExampleResult, write_results
from svc.evaluation.verdict import GateReport
from svc.registry.adapter import CONFIG_FILE
from svc.registry.files import record_file, record_files
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.manifest import BaseRecord, DataRecord, FormatRecord, Manifest, write_manifest
from svc.registry.registry import HELDOUT_FILE, HELDOUT_TOKENS_FILE, REFERENCE_FOLDER, Registry, results_file
from svc.registry.tracking import Tracking
from svc.settings.engine import Device, GptqKernel
from svc.version import Alias, Format, Target, VersionId
from tests.serving.engine_double import logprob_of, tokenized
from tests.svc.chats import chat
from tests.svc.registry.manifests import exact_match_metrics

NAME = "tuned"
FACTS = EngineFacts(
    vllm="0.32.0",
    device=Device.CPU,
    instruction_set="x86_64-avx2",
    mode="eager",
    dtype="bfloat16",
    kernel=GptqKernel.VLLM,
)
OTHER_FACTS = FACTS.model_copy(update={"vllm": "0.33.0"})
MAX_TOKENS = 3
HELDOUT = tuple(chat(f"question {number}", f"{number}.0 {number}.1 {number}.2") for number in (1, 2, 3))
"""Held-out examples. Version N of the model gives the reference answer only to question N."""
RESULT = ExampleResult(
    answer="a", tokens=2, limit=MAX_TOKENS, finish_reason="stop", logprob=-0.5, nll=1.0, scored=1, hit=False
)
_TOKENS = tuple(range(5, 25))
"""Tokens of a probe. The log-probabilities of two folders are random: with 19 tokens no pair is as close as
within one version; with three tokens, one pair in 200 was."""


class AliasBook(Tracking):
    """MLflow's aliases without MLflow.

    Attributes:
        book: version that each alias points to.
        failures: how many of the next calls fail.
    """

    def __init__(self) -> None:
        super().__init__("memory")
        self.book: dict[Alias, VersionId] = {}
        self.failures = 0

    def aliases(self, name: str) -> dict[Alias, VersionId]:
        """Return all aliases of a model name."""
        self._fail()
        return {alias: version for alias, version in self.book.items() if version.name == name}

    def set_alias(self, version: VersionId, alias: Alias) -> None:
        """Move an alias to a version."""
        self._fail()
        self.book[alias] = version

    def adopt(self, version: VersionId, source: str) -> None:
        """Do nothing, because no versions are stored here."""

    def discard(self, version: VersionId) -> None:
        """Do nothing, because no versions are stored here."""

    def _fail(self) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("MLflow is away")


def target(number: int, format: Format = Format.MERGED) -> Target:
    """Return a version of the model as a target."""
    return Target(VersionId(NAME, number), format)


def make_version(
    registry: Registry,
    number: int,
    *,
    formats: tuple[Format, ...] = (Format.MERGED,),
    probes_of: str | None = None,
    noise: float = 0.0,
    facts: EngineFacts = FACTS,
    width: int = 4,
    fingerprint: bool = True,
    probes: bool = True,
    answered: int = 0,
    failed: tuple[str, ...] = (),
    gates: tuple[GateReport, ...] = (),
    name: str = NAME,
    adapter: Mapping[str, Any] | None = None,
    compared: bool = False,
    heldout: Sequence[ChatExample] = HELDOUT,
) -> VersionId:
    """Register a version.

    Args:
        probes_of: folder whose log-probabilities its probes have, if not its own.
        noise: nats added to the recorded log-probabilities.
        facts: the engine that qualified it.
        width: width of its one tensor; versions of different widths cannot replace each other in place.
        fingerprint: whether the manifest has one.
        probes: whether it has any.
        answered: number of its three held-out examples with registered answers; if 0, it stores none.
        failed: checks that it failed.
        gates: their verdicts.
        adapter: fields of its adapter's config that differ from plain LoRA of rank 16; its base is created too.
        compared: whether it has a reference to compare prompts with.
        heldout: its held-out examples.
    """
    version = VersionId(name, number)
    folder = registry.folder(version)
    folder.mkdir(parents=True)
    write_examples(folder / HELDOUT_FILE, heldout)
    (folder / REFERENCE_FOLDER).mkdir()
    write_tokenized(folder / REFERENCE_FOLDER / HELDOUT_TOKENS_FILE, map(tokenized, HELDOUT))
    write_prompt_hashes(folder / REFERENCE_FOLDER / TRAINED_PROMPTS_FILE, NO_PROMPTS)
    if compared:
        write_examples(folder / REFERENCE_FOLDER / DRIFT_SAMPLE_FILE, HELDOUT)
        space = fit_text_space([example.question for example in HELDOUT], [example.answer for example in HELDOUT])
        save_text_space(folder / REFERENCE_FOLDER / TEXT_SPACE_FILE, space)
    records: dict[Format, FormatRecord] = {}
    for format in formats:
        if format is Format.ADAPTER:
            records[format] = _adapter(registry, folder, adapter or {})
            continue
        if answered:
            write_results(folder / REFERENCE_FOLDER / results_file(format), [RESULT] * answered)
        model = folder / format.value
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"hidden_size": width, "format": format}))
        (model / "tokenizer.json").write_text("{}")
        save_file({"weight": np.full((width,), number, dtype=np.float32)}, model / "model.safetensors")
        logprobs = tuple(
            logprob_of(probes_of or str(model), token, at) + noise for at, token in enumerate(_TOKENS) if at
        )
        probe = Probe(token_ids=_TOKENS, start=1, logprobs=logprobs, tolerance=1e-3, engine=facts)
        records[format] = FormatRecord(
            files=record_files(folder, model),
            fingerprint=compatibility_fingerprint(model) if fingerprint else None,
            probes=(probe,) if probes else (),
        )
    write_manifest(folder, _manifest(version, folder, records, failed, gates))
    return version


def base_folder(registry: Registry) -> Path:
    """Return the base of all adapters, creating it if it is missing."""
    base = registry.models.parent / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    return base


def _adapter(registry: Registry, version: Path, said: Mapping[str, Any]) -> FormatRecord:
    folder = version / Format.ADAPTER.value
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base_folder(registry)),
        "r": 16,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config | dict(said)))
    save_file({"weight": np.zeros((1,), dtype=np.float32)}, folder / "adapter_model.safetensors")
    return FormatRecord(files=record_files(version, folder))


def _manifest(
    version: VersionId,
    folder: Path,
    formats: dict[Format, FormatRecord],
    failed: tuple[str, ...],
    gates: tuple[GateReport, ...],
) -> Manifest:
    estimate = Interval(value=0.5, low=0.4, high=0.6)
    report = EvaluationReport(
        examples=1,
        exact_match=estimate,
        valid_json=None,
        cut_off=proportion(0, 1),
        nll=estimate,
        hits=(True,),
        seconds=1.0,
        metrics=exact_match_metrics(estimate),
        primary="exact_match",
    )
    return Manifest(
        name=version.name,
        number=version.number,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        run="run",
        tracking_run="tracking-run",
        base=BaseRecord(origin="base", revision="1", licence="Apache-2.0"),
        recipe={"evaluate": {"max_tokens": MAX_TOKENS}},
        data=DataRecord(train_fingerprint="a", train_examples=1, heldout_fingerprint="b", heldout_examples=1),
        heldout=record_file(folder, folder / HELDOUT_FILE),
        reference=record_files(folder, folder / REFERENCE_FOLDER),
        base_evaluation=report,
        formats=formats,
        libraries={},
        failed=failed,
        parity=None,
        judge=None,
        findings=(),
        forgetting={},
        gates=gates,
    )
