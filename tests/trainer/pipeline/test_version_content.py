"""Tests what a version stores from its training run."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from svc.dataset.prompt_hashes import hash_prompts
from svc.dataset.readers.reader import read_examples
from svc.drift_reference.drift_sample import DRIFT_SAMPLE_FILE, draw_drift_sample
from svc.drift_reference.text_embedding import TEXT_SPACE_FILE, load_text_space
from svc.errors import InterruptedRunError, NotFoundError
from svc.files.json_file import read_record
from svc.model_folder.chat_template import read_template_kwargs
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.manifest import SelectedBy
from svc.registry.registry import Registry
from svc.version import Format
from tests.trainer.conftest import make_example
from tests.trainer.engines import Engines
from tests.trainer.pipeline.stand_ins import CURVE, TRAIN, Make, Stages
from trainer.data.summary import DATA_SUMMARY_FILE, read_data_summary, summarize_data
from trainer.model.run_record import RUN_RECORD_FILE, MachineRecord, RunRecord
from trainer.pipeline import registration
from trainer.pipeline.evaluation import Evaluated
from trainer.pipeline.stages import Pipeline
from trainer.recipe.stage import Stage
from trainer.report.page import report_page
from trainer.report.report import gather_report
from trainer.training_curve import TRAINING_CURVE_FILE, read_training_curve

pytestmark = pytest.mark.slow


def test_version_stores_chat_template_arguments(make: Make, engines: Engines) -> None:
    pipeline = make(chat_template_kwargs={"enable_thinking": False})
    version = pipeline.train_version()
    for format in (Format.MERGED, Format.GPTQ):
        folder = pipeline.registry.artifact(version, format)
        assert read_template_kwargs(folder) == {"enable_thinking": False}
        assert pipeline.registry.manifest(version).formats[format].fingerprint == compatibility_fingerprint(folder)
        pipeline.registry.verify(version, format)
    assert engines.started_with[:2] == ["base", "merged"], "the merged model was not evaluated in the base's engine"


def test_no_template_arguments_file_is_written_when_there_are_no_arguments(pipeline: Pipeline) -> None:
    folder = pipeline.registry.artifact(pipeline.train_version(), Format.MERGED)
    assert not (folder / "chat_template_kwargs.json").exists()


def test_manifest_records_what_went_into_a_version(pipeline: Pipeline) -> None:
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert (manifest.base.origin, manifest.base.revision, manifest.base.licence) == ("./base", "sha256:0", "Apache-2.0")
    assert manifest.data.train_fingerprint == pipeline.examples.train_fingerprint
    assert (manifest.data.train_examples, manifest.data.heldout_examples) == (3, 2)
    assert manifest.recipe == pipeline.recipe.model_dump(mode="json")
    assert manifest.run == pipeline.run.folder.name
    assert "torch" in manifest.libraries


def test_manifest_records_which_example_set_was_used_for_model_selection(make: Make) -> None:
    pipeline = make()
    examples = replace(pipeline.examples, validation=pipeline.examples.heldout[:1]).selected
    pipeline = replace(pipeline, examples=examples)
    data = pipeline.registry.manifest(pipeline.train_version()).data
    assert (data.selected_by, data.validation_examples) == (SelectedBy.VALIDATION, 1)


def test_manifest_records_when_the_training_files_were_modified(make: Make) -> None:
    pipeline = make()
    modified_at = datetime(2026, 5, 1, 12, tzinfo=UTC)
    pipeline = replace(pipeline, examples=replace(pipeline.examples, modified_at=modified_at))
    assert pipeline.registry.manifest(pipeline.train_version()).data.modified_at == modified_at


def test_manifest_includes_evaluation_and_probes_of_each_served_format(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    for format in (Format.MERGED, Format.GPTQ):
        record = pipeline.registry.format(version, format)
        assert record.evaluation is not None
        assert record.probes
        assert record.fingerprint == compatibility_fingerprint(pipeline.registry.artifact(version, format))


def test_version_stores_its_training_curve(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    assert read_training_curve(pipeline.registry.reference(version, TRAINING_CURVE_FILE)) == CURVE


def test_version_stores_the_answers_generated_in_each_served_format(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    for format in (Format.MERGED, Format.GPTQ):
        results = pipeline.registry.results(version, format)
        assert [result.answer.split()[0] for result in results] == [f"{format}.0"] * 2
        evaluation = pipeline.registry.format(version, format).evaluation
        assert evaluation is not None
        tokens = sum(result.scored or 0 for result in results)
        total = sum(result.nll * (result.scored or 0) for result in results)
        assert total / tokens == pytest.approx(evaluation.nll.value)


def test_version_stores_base_answers_taken_from_the_cache(make: Make) -> None:
    first = make()
    asked = first.registry.base_results(first.train_version())
    again = make(train={"seed": 1})
    known = again.registry.base_results(again.train_version())
    assert [result.answer.split()[0] for result in asked] == ["base.0"] * 2
    assert known == asked, "the cached answers differ from the given ones"


def test_base_and_merged_answers_are_scored_with_the_recipe_metrics(make: Make) -> None:
    pipeline = make(evaluate={"metrics": ["chrf"]})
    version = pipeline.train_version()
    results = pipeline.registry.base_results(version), pipeline.registry.results(version, Format.MERGED)
    assert {tuple(result.scores) for of_model in results for result in of_model} == {("chrf",)}


def test_version_has_no_base_answers_when_the_base_is_not_evaluated(make: Make) -> None:
    pipeline = make(formats=["gptq"])
    version = pipeline.train_version()
    with pytest.raises(NotFoundError, match=r"has no file reference/base\.jsonl"):
        pipeline.registry.base_results(version)


def test_version_stores_only_evaluated_answers_when_evaluation_is_limited(make: Make) -> None:
    pipeline = make(evaluate={"limit": 1})
    version = pipeline.train_version()
    assert len(pipeline.registry.results(version, Format.GPTQ)) == 1
    assert len(pipeline.registry.heldout(version)) == 2


def test_stored_answers_are_kept_when_a_later_stage_is_interrupted(make: Make, stages: Stages) -> None:
    stages.broken = {Stage.QUANTIZE}
    with pytest.raises(InterruptedRunError):
        make().train_version()
    stages.broken = set()
    pipeline = make()
    answered = pipeline.run.load(Stage.EVALUATE, Evaluated).merged.results
    assert len(answered) == 2
    assert pipeline.registry.results(pipeline.train_version(), Format.MERGED) == answered


def test_reference_folder_is_rewritten_after_an_interrupted_registration(
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
        "base.jsonl",
        "data_summary.json",
        "drift_sample.jsonl",
        "gptq.jsonl",
        "heldout_tokens.jsonl",
        "merged.jsonl",
        "parity.html",
        "run.json",
        "text_space.npz",
        "trained_prompts.npy",
        "training.jsonl",
    )
    assert recorded == [f"reference/{file}" for file in files]
    stored = (pipeline.registry.folder(version) / "reference").iterdir()
    assert {f"reference/{path.name}" for path in stored} == set(recorded)


def test_drift_sample_is_drawn_from_all_user_supplied_examples(pipeline: Pipeline) -> None:
    version = pipeline.train_version()
    sample = read_examples(pipeline.registry.reference(version, DRIFT_SAMPLE_FILE))
    assert sample == draw_drift_sample(pipeline.examples.given, pipeline.recipe.data.seed).sample


def test_words_found_only_in_the_drift_sample_are_unknown_to_the_drift_reference(make: Make) -> None:
    """Otherwise, every live prompt would have more unknown words than the reference has."""
    heldout = tuple(make_example(word, "red") for word in ("xylophone", "marimba", "celesta", "timpani"))
    pipeline = make(heldout=heldout, data={"train": "train.jsonl", "seed": 0})
    version = pipeline.train_version()
    space = load_text_space(pipeline.registry.reference(version, TEXT_SPACE_FILE))
    drawn = draw_drift_sample(pipeline.examples.given, 0)
    sampled = [example.question for example in drawn.sample if example in heldout]
    assert sampled, "another seed is needed: only held-out prompts have words that no other prompt has"
    assert space.unknown_words([example.question for example in drawn.rest]).tolist() == [0.0] * len(drawn.rest)
    assert space.unknown_words(sampled).tolist() == [1.0] * len(sampled)


def test_version_stores_the_hashes_of_its_training_prompts(pipeline: Pipeline) -> None:
    learnt = pipeline.registry.learnt_prompts(pipeline.train_version().name)
    assert set(learnt.tolist()) == set(hash_prompts(TRAIN).tolist())


def test_version_stores_a_summary_of_its_data(make: Make) -> None:
    pipeline = make()
    stored = read_data_summary(pipeline.registry.reference(pipeline.train_version(), DATA_SUMMARY_FILE))
    assert stored == summarize_data(pipeline.examples.train, pipeline.examples.heldout)


def test_version_stores_a_record_of_its_training_run(pipeline: Pipeline) -> None:
    record = read_record(pipeline.registry.reference(pipeline.train_version(), RUN_RECORD_FILE), RunRecord)
    assert (record.steps, record.tokens, record.seconds) == (3, 30, 3.0)
    assert record.number_type == pipeline.capabilities.training_type
    assert record.machine == MachineRecord.of_this_one()


def test_unserved_adapter_format_has_neither_an_evaluation_nor_verification_probes(pipeline: Pipeline) -> None:
    record = pipeline.registry.format(pipeline.train_version(), Format.ADAPTER)
    assert (record.evaluation, record.probes) == (None, ())


def test_weights_of_a_finished_run_are_hard_links_to_registry_files(pipeline: Pipeline) -> None:
    pipeline.train_version()
    assert all(path.stat().st_nlink > 1 for path in pipeline.run.folder.rglob("*.safetensors"))


def test_mlflow_page_is_identical_to_the_svc_report_output(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(registration, "report_page", report_page)
    version, tracking = pipeline.train_version(), pipeline.registry.tracking
    run = pipeline.registry.manifest(version).tracking_run
    page = MlflowClient(tracking.uri, tracking.uri).download_artifacts(run, f"{version.name}-{version.number}.html")
    assert Path(page).read_text("utf-8") == report_page(gather_report(pipeline.registry, version))


def test_version_is_registered_even_if_its_report_cannot_be_written(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(registration, "report_page", fail)
    pipeline = make()
    version = pipeline.train_version()
    assert version in pipeline.registry.versions()
    assert f"could not log the report of {version} to MLflow" in caplog.text


def test_mlflow_shows_the_description_and_metrics_of_a_version(pipeline: Pipeline) -> None:
    from mlflow import MlflowClient

    version = pipeline.train_version()
    client = MlflowClient(pipeline.registry.tracking.uri, pipeline.registry.tracking.uri)
    shown = client.get_model_version(version.name, str(version.number))
    run = client.get_run(shown.run_id)
    [page] = client.list_artifacts(shown.run_id)
    link = f"#/experiments/{run.info.experiment_id}/runs/{shown.run_id}/artifacts/{page.path}"
    assert page.path == f"{version.name}-{version.number}.html"
    assert shown.description == f"./base on 3 examples. [Report]({link})"
    assert shown.tags["source"] == str(pipeline.registry.folder(version))
    assert shown.tags["exact_match_gptq"].startswith("0.000")
    report = pipeline.registry.manifest(version).formats[Format.GPTQ].evaluation
    assert report is not None
    assert shown.tags[f"{report.primary}_gptq"] == str(report.figures[report.primary].estimate)
