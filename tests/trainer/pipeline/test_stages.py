"""From a recipe to a version, with stages that take no time: order, resumption, and what a failure leaves behind."""

import itertools
import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from svc.chat_template import read_template_kwargs
from svc.dataset.drift_sample import DRIFT_SAMPLE_FILE, draw_drift_sample
from svc.dataset.fingerprint import fingerprint
from svc.dataset.prompt_hashes import hash_prompts
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.engine.capabilities import Capabilities, NumberType
from svc.errors import (
    BaseModelError,
    BusyError,
    DiskSpaceError,
    EngineError,
    IntegrityError,
    InterruptedRunError,
    NotFoundError,
    RecipeError,
    TrainingError,
)
from svc.lock import hold_lock
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.housekeeping import remove_version
from svc.registry.parity import ParityReport
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.settings import Device, EngineSettings, GptqKernel, Settings
from svc.store.database import open_database
from svc.text_embedding import TEXT_SPACE_FILE, load_text_space
from svc.training_runs import find_training_runs
from svc.version import Format, VersionId
from tests.serving.engine_double import tokenized
from tests.svc.engine.devices import AVX2, AVX512
from tests.svc.registry.model_folder import GPTQ, write_model
from tests.svc.registry.parity import make_parity
from tests.trainer.conftest import make_example, make_recipe
from tests.trainer.engines import Engines
from trainer.base_model.resolve import Base
from trainer.callbacks.loss_point import LossPoint
from trainer.export.gptq import QuantizeSummary
from trainer.export.verify_merge import MergeSummary
from trainer.parity import report as parity_module
from trainer.parity.report import Made
from trainer.pipeline import stages as stages_module
from trainer.pipeline.examples import Examples
from trainer.pipeline.find_base import find_base, merged_revision
from trainer.pipeline.run_folder import Run
from trainer.pipeline.stage_key import Stage
from trainer.pipeline.stages import Evaluated, Pipeline
from trainer.recipe.sections import Method
from trainer.training import sft
from trainer.training.summary import TrainingSummary

_names = (f"pipeline-{number}" for number in itertools.count(1))
TRAIN = tuple(make_example(f"q {number}", "yes") for number in range(3))
WORSE_QUANTIZED = tuple(make_example(asked, "merged.0 merged.1 merged.2 merged.3") for asked in ("one", "two"))
"""Examples that the double answers rightly when it holds the merged weights, and wrongly with any other."""


@dataclass
class Stages:
    """The stages that need a real model, in its place: each writes a little and says that it ran.

    Attributes:
        ran: which ran, in order.
        broken: stages that are interrupted in the middle.
        number_types: those that they were told to compute in.
        compared: the formats of each parity report.
        unequal: checks of the parity report that fail.
    """

    ran: list[Stage] = field(default_factory=list)
    broken: set[Stage] = field(default_factory=set)
    number_types: list[NumberType] = field(default_factory=list)
    compared: list[list[Format]] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)

    def train_model(
        self, base: Path, data: Any, recipe: Any, out: Path, checkpoints: Path, report: Any, *, number_type: NumberType
    ) -> Any:
        """Writes an adapter, or a trained model."""
        self.number_types.append(number_type)
        self._run(Stage.TRAIN, out)
        if recipe.method is Method.FULL:
            write_model(out, seed=1)
        else:
            (out / "adapter_model.safetensors").write_bytes(b"adapter")
        report(1, {"loss": 0.5})
        return TrainingSummary(3, 30, 10.0, 0.5, 3.0, (LossPoint(1, 0.5),))

    def merge_adapter(self, base: Path, adapter: Path, out: Path) -> MergeSummary:
        """Writes other weights of the same shape."""
        self._run(Stage.MERGE, out)
        write_model(out, seed=1)
        return MergeSummary(2, 0.5, 0.1)

    def check_layers(self, model: Path, group_size: int, multiple: int) -> list[str]:
        """Finds that 128 does not fit."""
        if group_size == 128:
            raise RecipeError("quantize.group_size is 128")
        return []

    def quantize_gptq(
        self, merged: Path, examples: Any, recipe: Any, out: Path, *, number_type: NumberType
    ) -> QuantizeSummary:
        """Writes a quantized model."""
        self.number_types.append(number_type)
        self._run(Stage.QUANTIZE, out)
        write_model(out, quantization=GPTQ)
        return QuantizeSummary(2, 8, 80, "layer.0", 0.01, 2.0)

    def make_report(self, made: Made, recipe: Any, compared: Any, judged: int, *, number_type: Any) -> ParityReport:
        """Finds what it is told to."""
        self.compared.append(sorted(made.formats))
        return make_parity(*self.unequal)

    def _run(self, stage: Stage, out: Path) -> None:
        self.ran.append(stage)
        out.mkdir(parents=True, exist_ok=True)
        if stage in self.broken:
            (out / "half-written").touch()
            raise KeyboardInterrupt


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages()
    monkeypatch.setattr(sft, "train_model", stages.train_model)
    monkeypatch.setattr(
        stages_module, "tokenize_as_trained", lambda folder, examples, kwargs: list(map(tokenized, examples))
    )
    monkeypatch.setattr(parity_module, "make_report", stages.make_report)
    for name in ("check_layers", "merge_adapter", "quantize_gptq"):
        monkeypatch.setattr(stages_module, name, getattr(stages, name))
    return stages


@pytest.fixture
def engines() -> Engines:
    return Engines()


Make = Callable[..., Pipeline]


@pytest.fixture
def make(tmp_path: Path, tracking: Tracking, stages: Stages, engines: Engines) -> Iterator[Make]:
    """The pipeline of one recipe; made again, it goes on in the same folder, as a new process would."""
    name = next(_names)
    base = Base(write_model(tmp_path / "base"), "./base", "Apache-2.0", "sha256:0")
    settings = Settings(home=tmp_path / "home", engine=EngineSettings(device=Device.CPU))

    def make(
        heldout: tuple[ChatExample, ...] | None = None,
        capabilities: Capabilities = AVX512,
        engine: EngineSettings = settings.engine,
        **sections: Any,
    ) -> Pipeline:
        recipe = make_recipe(**({"name": name, "qualify": {"repeats": 1}} | sections))
        judged = heldout or (make_example("one", "red"), make_example("two", "blue"))
        examples = Examples(TRAIN, judged, fingerprint(TRAIN), fingerprint(judged), (*TRAIN, *judged))
        run = Run.of(settings.home / "runs", recipe, base, examples)
        registry = Registry(settings.home / "models", tracking)
        chosen = settings.model_copy(update={"engine": engine})
        return Pipeline(chosen, capabilities, registry, recipe, base, examples, run, engines)

    yield make
    assert engines.running == 0


@pytest.fixture
def pipeline(make: Make) -> Pipeline:
    return make()


@pytest.mark.parametrize(("capabilities", "number_type"), [(AVX512, NumberType.BFLOAT16), (AVX2, NumberType.FLOAT32)])
def test_training_and_quantizing_compute_in_numbers_that_are_fast_here(
    make: Make, stages: Stages, capabilities: Capabilities, number_type: NumberType
) -> None:
    make(capabilities=capabilities).train_version()
    assert stages.number_types == [number_type, number_type]


def test_what_was_chosen_for_the_device_is_told_before_training(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make(capabilities=AVX2).train_version()
    told = " ".join(capsys.readouterr().err.split())
    assert "train: float32 on cpu (x86_64-avx2 has no fast bfloat16)" in told
    assert "merged: float32 on cpu (x86_64-avx2 has no fast numbers of 16 bits)" in told
    assert "gptq: bfloat16 on cpu, kernel of torch (vLLM has none for x86_64-avx2)" in told


def test_a_format_that_cannot_be_served_here_is_told_before_training(make: Make, stages: Stages) -> None:
    pipeline = make(capabilities=AVX2, engine=EngineSettings(device=Device.CPU, gptq_kernel=GptqKernel.VLLM))
    with pytest.raises(EngineError, match="no kernel for GPTQ"):
        pipeline.train_version()
    assert stages.ran == []


def test_a_recipe_becomes_a_version_in_all_formats(pipeline: Pipeline, stages: Stages) -> None:
    version = pipeline.train_version()
    assert version.number == 1
    assert stages.ran == [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE]
    assert list(pipeline.registry.manifest(version).formats) == list(Format)
    for format in Format:
        pipeline.registry.verify(version, format)


def test_others_see_that_a_run_is_worked_on_in_every_stage(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Stage, bool]] = []

    def look(run: Run, stage: Stage, need: int) -> None:
        (found,) = find_training_runs(pipeline.settings.home)
        seen.append((stage, found.running))

    monkeypatch.setattr(Run, "require_space", look)
    pipeline.train_version()
    assert seen == [(stage, True) for stage in Stage]


def test_a_version_keeps_what_its_chat_template_was_given(make: Make, engines: Engines) -> None:
    pipeline = make(chat_template_kwargs={"enable_thinking": False})
    version = pipeline.train_version()
    for format in (Format.MERGED, Format.GPTQ):
        folder = pipeline.registry.artifact(version, format)
        assert read_template_kwargs(folder) == {"enable_thinking": False}
        assert pipeline.registry.manifest(version).formats[format].fingerprint == compatibility_fingerprint(folder)
        pipeline.registry.verify(version, format)
    assert engines.started_with[:2] == ["base", "merged"], "the merged model was not judged in the base's engine"


def test_a_template_that_is_given_nothing_leaves_no_file(pipeline: Pipeline) -> None:
    folder = pipeline.registry.artifact(pipeline.train_version(), Format.MERGED)
    assert not (folder / "chat_template_kwargs.json").exists()


def test_the_manifest_says_what_it_was_made_of(pipeline: Pipeline) -> None:
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert (manifest.base.origin, manifest.base.revision, manifest.base.licence) == ("./base", "sha256:0", "Apache-2.0")
    assert manifest.data.train_fingerprint == pipeline.examples.train_fingerprint
    assert (manifest.data.train_examples, manifest.data.heldout_examples) == (3, 2)
    assert manifest.recipe == pipeline.recipe.model_dump(mode="json")
    assert manifest.run == pipeline.run.folder.name
    assert "torch" in manifest.libraries


def test_the_manifest_has_the_verification_of_each_served_format(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    for format in (Format.MERGED, Format.GPTQ):
        record = pipeline.registry.format(version, format)
        assert record.evaluation is not None
        assert record.probes
        assert record.fingerprint == compatibility_fingerprint(pipeline.registry.artifact(version, format))


def test_the_version_keeps_what_each_served_format_answered(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    for format in (Format.MERGED, Format.GPTQ):
        results = pipeline.registry.results(version, format)
        assert [result.answer.split()[0] for result in results] == [f"{format}.0"] * 2
        evaluation = pipeline.registry.format(version, format).evaluation
        assert evaluation is not None
        tokens = sum(result.scored or 0 for result in results)
        total = sum(result.nll * (result.scored or 0) for result in results)
        assert total / tokens == pytest.approx(evaluation.nll.value)


def test_a_base_that_was_judged_on_these_examples_is_not_asked_again(make: Make, engines: Engines) -> None:
    first = make()
    asked = first.registry.manifest(first.train_version()).base_evaluation
    assert asked is not None
    launched = len(engines.launched)
    again = make(train={"seed": 1})
    known = again.registry.manifest(again.train_version()).base_evaluation
    assert "base" not in engines.started_with[launched:]
    assert known == asked.model_copy(update={"seconds": 0.0})


def test_a_base_is_asked_again_on_other_examples(make: Make, engines: Engines) -> None:
    make().train_version()
    launched = len(engines.launched)
    make(heldout=(make_example("three", "red"),)).train_version()
    assert engines.started_with[launched] == "base"


def test_a_version_that_is_a_base_was_judged_when_it_was_made(make: Make, engines: Engines) -> None:
    first = make()
    version = first.train_version()
    manifest, launched = first.registry.manifest(version), len(engines.launched)
    folder = first.registry.artifact(version, Format.MERGED)
    second = replace(make(train={"seed": 1}), base=Base(folder, str(version), None, merged_revision(manifest)))
    judged = second.registry.manifest(second.train_version()).base_evaluation
    assert str(folder) not in [engine.double.weights for engine in engines.launched[launched:]]
    merged = manifest.formats[Format.MERGED].evaluation
    assert merged is not None
    assert judged is not None
    assert judged.hits == merged.hits


def test_of_a_limited_evaluation_the_first_answers_are_kept(make: Make) -> None:
    pipeline = make(evaluate={"limit": 1})
    version = pipeline.train_version()
    assert len(pipeline.registry.results(version, Format.GPTQ)) == 1
    assert len(pipeline.registry.heldout(version)) == 2


def test_answers_survive_an_interruption(make: Make, stages: Stages) -> None:
    stages.broken = {Stage.QUANTIZE}
    with pytest.raises(InterruptedRunError):
        make().train_version()
    stages.broken = set()
    pipeline = make()
    answered = pipeline.run.load(Stage.EVALUATE, Evaluated).merged.results
    assert len(answered) == 2
    assert pipeline.registry.results(pipeline.train_version(), Format.MERGED) == answered


def test_a_run_that_an_older_release_began_makes_a_version_without_its_answers(make: Make, stages: Stages) -> None:
    stages.broken = {Stage.QUANTIZE}
    with pytest.raises(InterruptedRunError):
        make().train_version()
    stages.broken = set()
    pipeline = make()
    result = pipeline.run.folder / f"{Stage.EVALUATE}.json"
    content = json.loads(result.read_text("utf-8"))
    del content["result"]["merged"]["results"]
    result.write_text(json.dumps(content), "utf-8")
    version = pipeline.train_version()
    with pytest.raises(NotFoundError):
        pipeline.registry.results(version, Format.MERGED)
    assert len(pipeline.registry.results(version, Format.GPTQ)) == 2


def test_an_interrupted_registration_leaves_nothing_in_what_a_version_is_compared_with(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Registry, *arguments: object) -> None:
        raise KeyboardInterrupt

    pipeline = make()
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "publish", interrupt)
        with pytest.raises(InterruptedRunError):
            pipeline.train_version()
    (pipeline.run.reference / "half-written").touch()
    version = make().train_version()
    recorded = [record.path for record in pipeline.registry.manifest(version).reference]
    files = (
        "drift_sample.jsonl",
        "gptq.jsonl",
        "heldout_tokens.jsonl",
        "merged.jsonl",
        "parity.html",
        "text_space.npz",
        "trained_prompts.npy",
    )
    assert recorded == [f"reference/{file}" for file in files]
    kept = (pipeline.registry.folder(version) / "reference").iterdir()
    assert {f"reference/{path.name}" for path in kept} == set(recorded)


def test_what_prompts_are_compared_with_is_drawn_of_all_that_was_given(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    sample = read_examples(pipeline.registry.reference(version, DRIFT_SAMPLE_FILE))
    assert sample == draw_drift_sample(pipeline.examples.given, pipeline.recipe.data.seed).sample


def test_the_text_space_knows_the_words_of_all_prompts_but_those_that_are_compared(make: Make) -> None:
    """Or every live prompt would have more unknown words than the reference."""
    judged = tuple(make_example(word, "red") for word in ("xylophone", "marimba", "celesta", "timpani"))
    pipeline = make(heldout=judged, data={"train": "train.jsonl", "seed": 0})
    version = pipeline.train_version()
    space = load_text_space(pipeline.registry.reference(version, TEXT_SPACE_FILE))
    drawn = draw_drift_sample(pipeline.examples.given, 0)
    sampled = [example.question for example in drawn.sample if example in judged]
    assert sampled, "another seed is needed: only held-out prompts have words of their own"
    assert space.unknown_words([example.question for example in drawn.rest]).tolist() == [0.0] * len(drawn.rest)
    assert space.unknown_words(sampled).tolist() == [1.0] * len(sampled)


def test_the_version_keeps_which_prompts_it_learnt(pipeline: Pipeline) -> None:
    learnt = pipeline.registry.learnt_prompts(pipeline.train_version().name)
    assert set(learnt.tolist()) == set(hash_prompts(TRAIN).tolist())


def test_an_unserved_adapter_has_no_verification(pipeline: Pipeline) -> None:
    record = pipeline.registry.format(pipeline.train_version(), Format.ADAPTER)
    assert (record.evaluation, record.probes) == (None, ())


def test_the_weights_of_a_finished_run_take_no_room_beside_the_registrys(pipeline: Pipeline) -> None:
    pipeline.train_version()
    assert all(path.stat().st_nlink > 1 for path in pipeline.run.folder.rglob("*.safetensors"))


def test_another_quantization_trains_nothing_again_and_makes_the_next_version(make: Make, stages: Stages) -> None:
    first = make().train_version()
    ran = len(stages.ran)
    pipeline = make(quantize={"group_size": 32})
    assert pipeline.train_version() == VersionId(first.name, 2)
    assert stages.ran[ran:] == [Stage.QUANTIZE]
    for version, group_size in ((first, 64), (VersionId(first.name, 2), 32)):
        assert pipeline.registry.manifest(version).recipe["quantize"]["group_size"] == group_size
        for format in Format:
            pipeline.registry.verify(version, format)


def test_what_is_compared_with_other_limits_is_not_measured_again(make: Make, stages: Stages, engines: Engines) -> None:
    with pytest.raises(TrainingError, match=r"GPTQ lost 1\.000"):
        make(WORSE_QUANTIZED).train_version()
    ran, launched = len(stages.ran), len(engines.launched)
    assert make(WORSE_QUANTIZED, evaluate={"max_gptq_loss": 1.0}).train_version().number == 1
    assert (len(stages.ran), len(engines.launched)) == (ran, launched)


def test_a_version_that_fails_is_registered_where_that_is_asked_for(make: Make) -> None:
    pipeline = replace(make(WORSE_QUANTIZED), register_failed=True)
    (failure,) = pipeline.registry.manifest(pipeline.train_version()).failed
    assert failure.startswith("GPTQ lost 1.000 of exact match")
    assert pipeline.train_version().number == 1


def test_a_failed_version_that_is_registered_is_none_to_whoever_asks_for_a_good_one(make: Make) -> None:
    replace(make(WORSE_QUANTIZED), register_failed=True).train_version()
    with pytest.raises(TrainingError, match=r"GPTQ lost 1\.000"):
        make(WORSE_QUANTIZED).train_version()


def test_a_version_that_is_not_what_was_trained_becomes_none_and_nothing_is_measured_again(
    make: Make, stages: Stages, engines: Engines
) -> None:
    stages.unequal = ["another template", "wrong scale"]
    with pytest.raises(TrainingError, match=r"is not what was trained: another template: <other>.*; wrong scale"):
        make().train_version()
    launched = len(engines.launched)
    pipeline = replace(make(), register_failed=True)
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert len(engines.launched) == launched
    assert [failure.partition(": another")[0] for failure in manifest.failed] == [
        "what would be served is not what was trained"
    ]
    assert manifest.parity == make_parity(*stages.unequal)


def test_a_version_has_its_parity_report_and_its_page(make: Make, stages: Stages) -> None:
    pipeline = make()
    version = pipeline.train_version()
    assert stages.compared == [[Format.GPTQ, Format.MERGED]]
    assert pipeline.registry.manifest(version).parity == make_parity()
    page = pipeline.registry.reference(version, "parity.html").read_text("utf-8")
    assert "All 1 checks passed" in page


def test_a_check_that_passes_by_now_makes_a_version_beside_the_failed_one(make: Make, stages: Stages) -> None:
    """As after a release that measures otherwise: the recipe is the same, and the failed version is not the answer."""
    stages.unequal = ["another template"]
    failed = replace(make(), register_failed=True).train_version()
    stages.unequal = []
    pipeline = make()
    (pipeline.run.folder / "parity.json").unlink()
    version = pipeline.train_version()
    assert (failed.number, version.number) == (1, 2)
    assert pipeline.registry.manifest(version).failed == ()


def test_a_later_try_makes_the_next_number(make: Make) -> None:
    failed = replace(make(WORSE_QUANTIZED), register_failed=True).train_version()
    pipeline = make(WORSE_QUANTIZED, evaluate={"max_gptq_loss": 1.0})
    version = pipeline.train_version()
    assert (failed.number, version.number) == (1, 2)
    assert pipeline.registry.manifest(version).failed == ()


@pytest.mark.parametrize(
    ("formats", "ran", "started"),
    [
        (["merged", "gptq"], [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE], ["base", "merged", "gptq", "gptq"]),
        (["merged"], [Stage.TRAIN, Stage.MERGE], ["base", "merged"]),
        (["gptq"], [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE], ["gptq", "gptq"]),
        (["adapter"], [Stage.TRAIN], []),
    ],
    ids=str,
)
def test_only_the_formats_that_are_asked_for_are_made_and_judged(
    make: Make, stages: Stages, engines: Engines, formats: list[str], ran: list[Stage], started: list[str]
) -> None:
    pipeline = make(formats=formats)
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert stages.ran == ran
    assert engines.started_with == started
    assert set(manifest.formats) == {"adapter", *formats}
    assert (manifest.base_evaluation is not None) == ("merged" in formats)


def test_another_format_goes_on_from_what_is_done(make: Make, stages: Stages, engines: Engines) -> None:
    make(formats=["merged"]).train_version()
    ran, launched = len(stages.ran), len(engines.launched)
    assert make().train_version().number == 2
    assert stages.ran[ran:] == [Stage.QUANTIZE]
    assert engines.started_with[launched:] == ["gptq", "gptq"]


def test_a_width_that_cannot_be_quantized_is_no_matter_where_gptq_is_not_asked_for(make: Make) -> None:
    assert make(formats=["merged"], quantize={"group_size": 128}).train_version().number == 1


def test_a_finished_run_gives_its_version_again_and_does_nothing(make: Make, stages: Stages, engines: Engines) -> None:
    version = make().train_version()
    ran, launched = list(stages.ran), len(engines.launched)
    assert make().train_version() == version
    assert stages.ran == ran
    assert len(engines.launched) == launched


@pytest.mark.parametrize("broken", [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE])
def test_an_interrupted_stage_is_done_again_and_none_before_it(make: Make, stages: Stages, broken: Stage) -> None:
    stages.broken = {broken}
    with pytest.raises(InterruptedRunError):
        make().train_version()
    assert stages.ran[-1] is broken
    stages.broken = set()
    make().train_version()
    order = [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE]
    assert stages.ran == order[: order.index(broken) + 1] + order[order.index(broken) :]


@pytest.mark.parametrize("broken", [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE])
def test_what_an_interrupted_stage_left_does_not_get_into_the_version(
    make: Make, stages: Stages, broken: Stage
) -> None:
    stages.broken = {broken}
    with pytest.raises(InterruptedRunError):
        make().train_version()
    stages.broken = set()
    pipeline = make()
    folder = pipeline.registry.folder(pipeline.train_version())
    assert not list(folder.rglob("half-written"))


def test_an_evaluation_that_failed_is_done_again_alone(make: Make, stages: Stages, engines: Engines) -> None:
    engines.refusals = 1
    with pytest.raises(EngineError):
        make().train_version()
    make().train_version()
    assert stages.ran == [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE]
    assert engines.started_with == ["base", "merged", "gptq", "gptq"]


def test_a_resumed_run_goes_on_in_its_mlflow_run(make: Make, stages: Stages) -> None:
    stages.broken = {Stage.MERGE}
    with pytest.raises(InterruptedRunError):
        make().train_version()
    begun = make()._tracking_run()
    stages.broken = set()
    pipeline = make()
    assert pipeline.registry.manifest(pipeline.train_version()).tracking_run == begun


def test_a_second_one_on_the_same_run_is_refused_and_changes_nothing(pipeline: Pipeline, stages: Stages) -> None:
    with hold_lock(pipeline.run.lock, "it"), pytest.raises(BusyError, match=pipeline.run.folder.name):
        pipeline.train_version()
    assert stages.ran == []
    assert [path.name for path in pipeline.run.folder.iterdir()] == ["lock"]


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))


def test_a_full_disk_is_told_before_anything_is_written(
    pipeline: Pipeline, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes(monkeypatch, 1000)
    with pytest.raises(DiskSpaceError, match="stage train needs"):
        pipeline.train_version()
    assert stages.ran == []
    assert [path.name for path in pipeline.run.folder.iterdir()] == ["lock"]


def test_a_disk_that_fills_up_stops_before_the_next_stage_and_keeps_what_is_done(
    make: Make, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = stages.merge_adapter

    def merge_and_fill(base: Path, adapter: Path, out: Path) -> MergeSummary:
        summary = merge(base, adapter, out)
        free_bytes(monkeypatch, 1000)
        return summary

    monkeypatch.setattr(stages_module, "merge_adapter", merge_and_fill)
    pipeline = make()
    with pytest.raises(DiskSpaceError, match="stage evaluate needs"):
        pipeline.train_version()
    assert pipeline.run.done(Stage.MERGE)
    assert not pipeline.run.done(Stage.EVALUATE)
    free_bytes(monkeypatch, 10**12)
    assert make().train_version().number == 1
    assert stages.ran.count(Stage.MERGE) == 1


def test_a_disk_that_is_full_within_a_stage_is_told_and_the_run_goes_on(
    make: Make, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "merge_adapter", fill)
        with pytest.raises(DiskSpaceError, match="for what stage merge writes"):
            make().train_version()
    make().train_version()
    assert stages.ran.count(Stage.TRAIN) == 1


def test_a_quantized_model_that_is_worse_becomes_no_version(make: Make) -> None:
    pipeline = make(WORSE_QUANTIZED)
    with pytest.raises(TrainingError, match=r"GPTQ lost 1\.000 of exact match"):
        pipeline.train_version()
    assert pipeline.registry.versions() == []
    assert not pipeline.run.done(Stage.REGISTER)


def test_a_loss_that_the_recipe_allows_becomes_a_version(make: Make) -> None:
    assert make(WORSE_QUANTIZED, evaluate={"max_gptq_loss": 1.0}).train_version().number == 1


def test_a_registration_that_was_interrupted_goes_on_with_the_version_that_it_published(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make()

    def interrupt(self: Tracking, *arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracking, "annotate", interrupt)
        with pytest.raises(InterruptedRunError):
            pipeline.train_version()
    (published,) = pipeline.registry.versions()
    files = sorted(path for path in pipeline.registry.folder(published).rglob("*") if path.is_file())
    before = [(path, path.stat().st_mtime_ns) for path in files]
    assert make().train_version() == published
    assert pipeline.registry.versions() == [published]
    assert [(path, path.stat().st_mtime_ns) for path in files] == before


def test_a_recipe_whose_version_was_removed_makes_another(make: Make, tmp_path: Path) -> None:
    pipeline = make()
    first = pipeline.train_version()
    remove_version(pipeline.registry, open_database(tmp_path), first)
    assert make().train_version() == VersionId(first.name, first.number + 1)
    assert make().train_version() == VersionId(first.name, first.number + 1)


def test_a_damaged_version_of_the_name_is_in_nobodys_way(make: Make) -> None:
    pipeline = make()
    first = pipeline.train_version()
    manifest = pipeline.registry.folder(first) / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{", "utf-8")
    assert make(train={"seed": 1}).train_version().number == first.number + 1


def test_a_group_size_that_does_not_fit_is_told_before_training(make: Make, stages: Stages) -> None:
    with pytest.raises(RecipeError, match=r"quantize\.group_size is 128"):
        make(quantize={"group_size": 128}).train_version()
    assert stages.ran == []


def test_mlflow_shows_what_a_version_is(pipeline: Pipeline) -> None:
    from mlflow import MlflowClient

    version = pipeline.train_version()
    found = MlflowClient(pipeline.registry.tracking.uri, pipeline.registry.tracking.uri).get_model_version(
        version.name, str(version.number)
    )
    assert found.description == "./base on 3 examples"
    assert found.tags["source"] == str(pipeline.registry.folder(version))
    assert found.tags["exact_match_gptq"].startswith("0.000")


def test_a_registered_version_is_a_base(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    base = find_base(make_recipe(base=str(version)), pipeline.settings)
    assert base.folder == pipeline.registry.artifact(version, Format.MERGED)
    assert (base.origin, base.licence) == (str(version), "Apache-2.0")
    assert base.revision.startswith("sha256:")


def test_a_registered_version_that_was_altered_is_no_base(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    weights = pipeline.registry.artifact(version, Format.MERGED) / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"other")
    with pytest.raises(IntegrityError, match=r"model\.safetensors was changed"):
        find_base(make_recipe(base=str(version)), pipeline.settings)


@pytest.mark.parametrize("base", ["nobody@1", "nobody@production", "@"])
def test_a_version_that_is_not_there_is_no_base(tmp_path: Path, base: str) -> None:
    with pytest.raises(NotFoundError):
        find_base(make_recipe(base=base), Settings(home=tmp_path))


def test_an_unknown_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="unknown base model 'no-such-model'"):
        find_base(make_recipe(base="no-such-model"), Settings(home=tmp_path, base_cache=tmp_path))
