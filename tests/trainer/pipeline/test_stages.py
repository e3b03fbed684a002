"""Tests the pipeline from recipe to version with fast stand-ins: stage order, resumption and failures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from svc.dataset.schema.example import parse_example
from svc.engine.device import DeviceCapabilities, NumberType
from svc.engine.machine import Gpu, Machine
from svc.errors import BusyError, DataError, EngineError, InterruptedRunError, RecipeError, SettingsError, TrainingError
from svc.files.lock import hold_lock
from svc.registry.objects import ObjectStore
from svc.registry.registry import Registry
from svc.registry.training_runs import find_training_runs
from svc.settings.engine import Device, EngineSettings, GptqKernel
from svc.settings.storage import ArtifactSettings
from svc.training_progress import ProgressFile, ProgressReader, Registered, StageBegun
from svc.version import Format, VersionId
from tests.serving.engine_double import tokenized
from tests.svc.engine.devices import AVX2, AVX512, HOPPER
from tests.trainer.engines import Engines
from tests.trainer.estimate.configs import cpu_device, even_workload, published
from tests.trainer.pipeline.stand_ins import Make, Stages
from trainer.estimate.estimate import estimate_device
from trainer.pipeline import training_devices
from trainer.pipeline.run_folder import Run
from trainer.pipeline.stages import Pipeline
from trainer.recipe.stage import Stage, choose_stages
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints

pytestmark = pytest.mark.slow

GPU = "NVIDIA H100 80GB HBM3"

DEFAULT_FORMATS = [Format.ADAPTER, Format.MERGED, Format.GPTQ]


@pytest.mark.parametrize(("capabilities", "number_type"), [(AVX512, NumberType.BFLOAT16), (AVX2, NumberType.FLOAT32)])
def test_training_and_quantization_use_the_dtype_that_is_fast_on_the_device(
    make: Make, stages: Stages, capabilities: DeviceCapabilities, number_type: NumberType
) -> None:
    make(capabilities=capabilities).train_version()
    assert stages.number_types == [number_type, number_type]


def test_training_uses_and_prints_the_number_of_processes_in_the_recipe(
    make: Make, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    make(train={"devices": 2, "batch_size": 4, "gradient_accumulation": 2}).train_version()
    output = " ".join(capsys.readouterr().err.split())
    assert "training on 2 processes on the CPU: each handles 1 x 4 of the 2 x 4 examples in a step" in output
    assert stages.devices == [2]


def test_training_uses_the_gpus_that_nvidia_smi_reports_as_free(
    make: Make, stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = (70, 0, 0)
    gpus = tuple(Gpu(GPU, 80 * 2**30, (80 - each) * 2**30, f"GPU-{number}") for number, each in enumerate(used))
    monkeypatch.setattr(training_devices, "read_machine", lambda **_: Machine((0,), None, 2**40, 2**40, gpus))
    make(capabilities=HOPPER).train_version()
    output = " ".join(capsys.readouterr().err.split())
    assert "GPU 0 not used: another process uses 75.2 GB of it" in output
    assert f"training on GPU 1 ({GPU}), GPU 2 ({GPU}): each handles 1 x 8 of the 1 x 16 examples in a step" in output
    assert stages.devices == [2]


def test_run_folder_does_not_depend_on_devices_and_sharding(make: Make) -> None:
    changed = make(train={"devices": 2, "sharding": "always"})
    assert make().run.folder == changed.run.folder
    assert not {"train.devices", "train.sharding"} & set(changed.recipe.flat())


@pytest.mark.parametrize(
    ("sharding", "memory", "sharded"),
    [("always", 1e12, True), ("auto", 1e12, False), ("auto", 2e9, True), ("never", 2e9, False)],
)
def test_weights_are_sharded_if_the_recipe_says_so_or_a_full_copy_does_not_fit(
    make: Make, stages: Stages, sharding: str, memory: float, sharded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = make(train={"devices": 2, "sharding": sharding})
    device = replace(cpu_device(memory), count=2)
    recipe = pipeline.recipe
    expected = estimate_device(recipe, published("llama-2-7b"), even_workload(9, 99, recipe), device, 99)
    replace(pipeline, expected=expected).train_version()
    assert stages.sharded == [sharded]
    assert ("each device stores 1/2 of the weights" in capsys.readouterr().err) is sharded


@pytest.mark.parametrize("sharding", ["always", "auto"])
def test_single_training_process_does_not_shard_the_weights(make: Make, stages: Stages, sharding: str) -> None:
    make(train={"sharding": sharding}).train_version()
    assert stages.sharded == [False]


def test_dtypes_and_the_reasons_for_them_are_printed_before_training(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make(capabilities=AVX2).train_version()
    output = " ".join(capsys.readouterr().err.split())
    assert "train: float32 on cpu (x86_64-avx2 has no fast bfloat16)" in output
    assert "merged: float32 on cpu (x86_64-avx2 has no fast 16-bit arithmetic)" in output
    assert "gptq: bfloat16 on cpu, torch kernel (vLLM has none for x86_64-avx2)" in output


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_checkpointing_chosen_by_the_estimate_is_used_but_not_added_to_the_recipe(
    make: Make, stages: Stages, checkpointing: bool
) -> None:
    plain = make()
    recipe = plain.recipe
    device = replace(cpu_device(), cpu=False)
    asked = recipe.changed({"train.gradient_checkpointing": checkpointing})
    expected = estimate_device(asked, published("llama-2-7b"), even_workload(9, 99, recipe), device, 99)
    pipeline = replace(plain, expected=expected)
    version = pipeline.train_version()
    assert [trained.train.gradient_checkpointing for trained in stages.recipes] == [checkpointing]
    assert pipeline.registry.manifest(version).recipe["train"]["gradient_checkpointing"] is None
    assert plain.train_version() == version
    assert len(stages.recipes) == 1


def test_run_fails_before_training_if_a_format_cannot_be_served_on_this_machine(make: Make, stages: Stages) -> None:
    pipeline = make(capabilities=AVX2, engine=EngineSettings(device=Device.CPU, gptq_kernel=GptqKernel.VLLM))
    with pytest.raises(EngineError, match="no GPTQ kernel"):
        pipeline.train_version()
    assert stages.ran == []


def test_version_has_the_default_formats_unless_the_recipe_sets_formats(pipeline: Pipeline, stages: Stages) -> None:
    version = pipeline.train_version()
    assert version.number == 1
    assert stages.ran == [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE]
    assert list(pipeline.registry.manifest(version).formats) == DEFAULT_FORMATS
    for format in DEFAULT_FORMATS:
        pipeline.registry.verify(version, format)


def test_stages_and_the_registered_version_are_written_to_the_progress_file(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "progress"
    pipeline = replace(make(formats=["adapter"]), progress=ProgressFile(path))
    version = pipeline.train_version()
    pipeline.train_version()
    records = ProgressReader(path).read()
    stages = [StageBegun(name=stage) for stage in choose_stages(pipeline.recipe)]
    assert records == [*stages, Registered(version=str(version)), Registered(version=str(version))]


def test_run_is_listed_as_running_during_every_stage(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Stage, bool]] = []

    def record(run: Run, stage: Stage, need: int) -> None:
        (training_run,) = find_training_runs(pipeline.settings.home)
        seen.append((stage, training_run.running))

    monkeypatch.setattr(Run, "require_space", record)
    pipeline.train_version()
    assert seen == [(stage, True) for stage in choose_stages(pipeline.recipe)]


def test_changing_the_group_size_repeats_only_quantization(make: Make, stages: Stages) -> None:
    first = make().train_version()
    ran = len(stages.ran)
    pipeline = make(quantize={"group_size": 32})
    assert pipeline.train_version() == VersionId(first.name, 2)
    assert stages.ran[ran:] == [Stage.QUANTIZE]
    for version, group_size in ((first, 64), (VersionId(first.name, 2), 32)):
        assert pipeline.registry.manifest(version).recipe["quantize"]["group_size"] == group_size
        for format in DEFAULT_FORMATS:
            pipeline.registry.verify(version, format)


@pytest.mark.parametrize(
    ("formats", "ran", "started"),
    [
        (["merged", "gptq"], [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE], ["base", "merged", "gptq", "gptq"]),
        (["merged"], [Stage.TRAIN, Stage.MERGE], ["base", "merged"]),
        (["gptq"], [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE], ["gptq", "gptq"]),
        (["awq"], [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE_AWQ], ["awq", "awq"]),
        (["int8"], [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE_INT8], ["int8", "int8"]),
        (["adapter"], [Stage.TRAIN], []),
    ],
    ids=str,
)
def test_only_requested_formats_are_created_and_evaluated(
    make: Make, stages: Stages, engines: Engines, formats: list[str], ran: list[Stage], started: list[str]
) -> None:
    pipeline = make(formats=formats)
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert stages.ran == ran
    assert engines.started_with == started
    assert set(manifest.formats) == {"adapter", *formats}
    assert (manifest.base_evaluation is not None) == ("merged" in formats)


def test_finished_stages_are_not_repeated_when_a_format_is_added(make: Make, stages: Stages, engines: Engines) -> None:
    make(formats=["merged"]).train_version()
    ran, launched = len(stages.ran), len(engines.launched)
    assert make().train_version().number == 2
    assert stages.ran[ran:] == [Stage.QUANTIZE]
    assert engines.started_with[launched:] == ["gptq", "gptq"]


def test_adding_quantized_formats_runs_only_the_stages_of_those_formats(
    make: Make, stages: Stages, engines: Engines
) -> None:
    make().train_version()
    ran, launched = len(stages.ran), len(engines.launched)
    pipeline = make(formats=["merged", "gptq", "awq", "int8", "fp8"])
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert stages.ran[ran:] == [Stage.QUANTIZE_AWQ, Stage.QUANTIZE_INT8, Stage.QUANTIZE_FP8]
    assert engines.started_with[launched:] == ["awq", "awq", "int8", "int8", "fp8", "fp8"]
    assert {gate.format for gate in manifest.gates} == {Format.GPTQ, Format.AWQ, Format.INT8, Format.FP8}


def test_gguf_file_is_registered_without_an_evaluation(make: Make, stages: Stages, engines: Engines) -> None:
    pipeline = make(formats=["merged", "gguf"])
    version = pipeline.train_version()
    assert stages.ran == [Stage.TRAIN, Stage.MERGE, Stage.EXPORT_GGUF]
    assert engines.started_with == ["base", "merged"]
    record = pipeline.registry.manifest(version).formats[Format.GGUF]
    assert [file.path for file in record.files] == ["gguf/tiny-q8_0.gguf"]
    assert record.evaluation is None
    pipeline.registry.verify(version, Format.GGUF)


def test_base_that_cannot_be_written_to_gguf_is_rejected_before_training(make: Make, stages: Stages) -> None:
    stages.refused_gguf = True
    with pytest.raises(TrainingError, match="would have different token ids"):
        make(formats=["merged", "gguf"]).train_version()
    assert stages.ran == []


def test_group_size_is_not_checked_when_gptq_is_not_requested(make: Make) -> None:
    assert make(formats=["merged"], quantize={"group_size": 128}).train_version().number == 1


def test_short_engine_context_is_accepted_when_prompts_and_references_fit(make: Make, stages: Stages) -> None:
    short = EngineSettings(device=Device.CPU, max_model_len=16)
    pipeline = make(engine=short, formats=["merged"])
    version = pipeline.train_version()
    prompts = [len(tokenized(example).prompt) for example in pipeline.examples.heldout]
    limits = [result.limit for result in pipeline.registry.results(version, Format.MERGED)]
    assert limits == [16 - prompt for prompt in prompts]
    with pytest.raises(DataError, match="2 of 2 held-out examples need more than 16 tokens"):
        make(engine=short, formats=["merged"], evaluate={"max_tokens": 16}, train={"seed": 1}).train_version()


def test_run_stops_before_training_if_the_engine_cannot_parse_held_out_tool_calls(make: Make, stages: Stages) -> None:
    pipeline = make(formats=["merged"])
    heldout = pipeline.examples.heldout
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "rain"}}]}
    calling = parse_example({"messages": [{"role": "user", "content": "Rain?"}, call], "tools": [{"name": "rain"}]})
    pipeline = replace(pipeline, examples=replace(pipeline.examples, heldout=(*heldout, calling)))
    with pytest.raises(SettingsError, match="1 of 3 held-out answers call tools"):
        pipeline.train_version()
    assert stages.ran == []


def test_repeating_a_finished_run_returns_its_version_without_running_any_stage(
    make: Make, stages: Stages, engines: Engines
) -> None:
    version = make().train_version()
    ran, launched = list(stages.ran), len(engines.launched)
    assert make().train_version() == version
    assert stages.ran == ran
    assert len(engines.launched) == launched


@pytest.mark.parametrize("broken", [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE])
def test_resuming_a_run_repeats_only_the_interrupted_stage(make: Make, stages: Stages, broken: Stage) -> None:
    stages.broken = {broken}
    with pytest.raises(InterruptedRunError):
        make().train_version()
    assert stages.ran[-1] is broken
    stages.broken = set()
    make().train_version()
    order = [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE]
    assert stages.ran == order[: order.index(broken) + 1] + order[order.index(broken) :]


@pytest.mark.parametrize("broken", [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE])
def test_version_has_no_partial_files_after_an_interrupted_stage(make: Make, stages: Stages, broken: Stage) -> None:
    stages.broken = {broken}
    with pytest.raises(InterruptedRunError):
        make().train_version()
    stages.broken = set()
    pipeline = make()
    folder = pipeline.registry.folder(pipeline.train_version())
    assert not list(folder.rglob("half-written"))


def test_failed_evaluation_is_repeated_without_retraining(make: Make, stages: Stages, engines: Engines) -> None:
    engines.refusals = 1
    with pytest.raises(EngineError):
        make().train_version()
    make().train_version()
    assert stages.ran == [Stage.TRAIN, Stage.MERGE, Stage.QUANTIZE]
    assert engines.started_with == ["base", "merged", "gptq", "gptq"]


def test_resumed_run_uses_the_same_mlflow_run(make: Make, stages: Stages) -> None:
    stages.broken = {Stage.MERGE}
    with pytest.raises(InterruptedRunError):
        make().train_version()
    begun = make()._tracking_run()
    stages.broken = set()
    pipeline = make()
    assert pipeline.registry.manifest(pipeline.train_version()).tracking_run == begun


def test_second_process_is_rejected_and_changes_no_files_while_the_run_is_locked(
    pipeline: Pipeline, stages: Stages
) -> None:
    with hold_lock(pipeline.run.lock, "it"), pytest.raises(BusyError, match=pipeline.run.folder.name):
        pipeline.train_version()
    assert stages.ran == []
    assert [path.name for path in pipeline.run.folder.iterdir()] == ["lock"]


def test_run_fails_before_training_if_layer_sizes_are_not_multiples_of_the_group_size(
    make: Make, stages: Stages
) -> None:
    with pytest.raises(RecipeError, match=r"quantize\.group_size is 128"):
        make(quantize={"group_size": 128}).train_version()
    assert stages.ran == []


def test_checkpoints_are_fetched_from_the_object_store_before_training_and_deleted_after_registration(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shared").mkdir()
    objects = ObjectStore(f"file://{tmp_path / 'shared'}")
    pipeline = make()
    artifacts = ArtifactSettings(url=objects.url, checkpoints=True)
    pipeline = replace(
        pipeline,
        settings=pipeline.settings.model_copy(update={"artifacts": artifacts}),
        registry=Registry(pipeline.registry.models, pipeline.registry.tracking, objects),
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mlflow.json").write_text(json.dumps({"run_id": pipeline._tracking_run()}), "utf-8")
    name = pipeline.run.folder.name
    other = SharedCheckpoints(objects, name, elsewhere / "checkpoints", elsewhere / "mlflow.json")
    with CheckpointFolder(elsewhere / "checkpoints", 1, other.send).writing(1) as folder:
        (folder / "weights.safetensors").write_bytes(b"weights")
    pipeline.train_version()
    assert "fetched step-00000001, written by another machine" in capsys.readouterr().err
    assert objects.keys("checkpoints") == []
