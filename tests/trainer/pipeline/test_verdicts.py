"""Tests that versions failing a check are rejected, or registered with the failure."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svc.errors import InterruptedRunError, RecipeError, SettingsError, TrainingError
from svc.evaluation.verdict import Gate, GateOutcome
from svc.version import Format
from tests.svc.evaluation.judge_server import judge_server
from tests.svc.registry.parity import make_parity
from tests.trainer.conftest import make_example
from tests.trainer.engines import Engines
from tests.trainer.pipeline.stand_ins import WORSE_QUANTIZED, Make, Stages
from trainer.recipe.stage import Stage

pytestmark = pytest.mark.slow


def test_stored_evaluation_results_are_reused_after_a_gate_limit_is_raised(
    make: Make, stages: Stages, engines: Engines
) -> None:
    with pytest.raises(TrainingError, match=r"GPTQ lowered accuracy by 1\.000"):
        make(WORSE_QUANTIZED).train_version()
    ran, launched = len(stages.ran), len(engines.launched)
    assert make(WORSE_QUANTIZED, evaluate={"max_gptq_loss": 1.0}).train_version().number == 1
    assert (len(stages.ran), len(engines.launched)) == (ran, launched)


def test_version_with_degraded_8_bit_weights_is_rejected_with_advice_to_remove_the_format(make: Make) -> None:
    with pytest.raises(TrainingError, match=r"INT8 lowered accuracy by 1\.000") as caught:
        make(WORSE_QUANTIZED, formats=["merged", "int8"]).train_version()
    assert "remove int8 from `formats`" in caught.value.todo


def test_version_that_fails_a_check_is_registered_if_the_register_failed_option_is_set(make: Make) -> None:
    pipeline = replace(make(WORSE_QUANTIZED), register_failed=True)
    (failure,) = pipeline.registry.manifest(pipeline.train_version()).failed
    assert failure.startswith("GPTQ lowered accuracy by 1.000")
    assert pipeline.train_version().number == 1


def test_rerun_without_register_failed_fails_even_if_the_failed_version_was_registered_before(make: Make) -> None:
    replace(make(WORSE_QUANTIZED), register_failed=True).train_version()
    with pytest.raises(TrainingError, match=r"GPTQ lowered accuracy by 1\.000"):
        make(WORSE_QUANTIZED).train_version()


def test_setting_register_failed_registers_a_version_that_failed_parity_without_new_evaluations(
    make: Make, stages: Stages, engines: Engines
) -> None:
    stages.unequal = ["another template", "wrong scale"]
    with pytest.raises(
        TrainingError, match=r"differs from the trained model: another template: <other>.*; wrong scale"
    ):
        make().train_version()
    launched = len(engines.launched)
    pipeline = replace(make(), register_failed=True)
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert len(engines.launched) == launched
    assert [failure.partition(": another")[0] for failure in manifest.failed] == [
        "the model to serve differs from the trained model"
    ]
    assert manifest.parity == make_parity(*stages.unequal)


def test_parity_report_and_its_html_page_are_stored_with_the_version(make: Make, stages: Stages) -> None:
    pipeline = make()
    version = pipeline.train_version()
    assert stages.compared == [[Format.GPTQ, Format.MERGED]]
    assert pipeline.registry.manifest(version).parity == make_parity()
    page = pipeline.registry.reference(version, "parity.html").read_text("utf-8")
    assert "All 1 checks passed" in page


def test_new_version_is_registered_after_a_previously_failed_check_passes(make: Make, stages: Stages) -> None:
    """A later release may measure differently. The recipe must then not return the failed version."""
    stages.unequal = ["another template"]
    failed = replace(make(), register_failed=True).train_version()
    stages.unequal = []
    pipeline = make()
    (pipeline.run.folder / "parity.json").unlink()
    version = pipeline.train_version()
    assert (failed.number, version.number) == (1, 2)
    assert pipeline.registry.manifest(version).failed == ()


def test_version_registered_after_a_failed_version_gets_the_next_number(make: Make) -> None:
    failed = replace(make(WORSE_QUANTIZED), register_failed=True).train_version()
    pipeline = make(WORSE_QUANTIZED, evaluate={"max_gptq_loss": 1.0})
    version = pipeline.train_version()
    assert (failed.number, version.number) == (1, 2)
    assert pipeline.registry.manifest(version).failed == ()


def test_no_version_is_registered_when_the_quantized_model_is_worse(make: Make) -> None:
    pipeline = make(WORSE_QUANTIZED)
    with pytest.raises(TrainingError, match=r"GPTQ lowered accuracy by 1\.000"):
        pipeline.train_version()
    assert pipeline.registry.versions() == []
    assert not pipeline.run.done(Stage.REGISTER)


def test_undecided_version_is_registered_with_a_warning_and_its_verdicts(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = make()
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert [gate.gate for gate in manifest.gates] == [Gate.GPTQ_LOSS, Gate.GPTQ_NLL]
    assert {gate.verdict.outcome for gate in manifest.gates} == {GateOutcome.UNDECIDED}
    assert manifest.failed == ()
    output = " ".join(capsys.readouterr().err.split())
    assert all(" ".join(gate.split()) in output for gate in manifest.undecided)
    assert "cannot be excluded with 2 examples" in output


def test_rerun_registers_an_undecided_version_without_reevaluation_if_the_recipe_now_accepts_undecided_results(
    make: Make, stages: Stages, engines: Engines
) -> None:
    with pytest.raises(TrainingError, match="undecided: a loss of up to"):
        make(evaluate={"undecided": "fail"}).train_version()
    ran, launched = len(stages.ran), len(engines.launched)
    assert make().train_version().number == 1
    assert (len(stages.ran), len(engines.launched)) == (ran, launched)


def test_smallest_detectable_quality_loss_is_printed_before_training(
    make: Make, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.broken = {Stage.TRAIN}
    with pytest.raises(InterruptedRunError):
        make(WORSE_QUANTIZED).train_version()
    output = " ".join(capsys.readouterr().err.split())
    assert "7 held-out examples are enough to detect, with 80% power, a loss that differs from its limit by" in output
    assert "evaluate.max_gptq_loss is 0.05: about 320 are needed to pass a version without loss" in output


@pytest.mark.parametrize("evaluate", [{"max_gptq_loss": 1.0}, {"metrics": "perplexity"}])
def test_smallest_detectable_quality_loss_is_not_printed_without_a_limit_on_a_proportion_metric(
    make: Make, stages: Stages, capsys: pytest.CaptureFixture[str], evaluate: dict[str, Any]
) -> None:
    stages.broken = {Stage.TRAIN}
    with pytest.raises(InterruptedRunError):
        make(WORSE_QUANTIZED, evaluate=evaluate).train_version()
    assert "are enough to detect" not in capsys.readouterr().err


def test_version_is_registered_when_the_recipe_permits_its_quantization_loss(make: Make) -> None:
    assert make(WORSE_QUANTIZED, evaluate={"max_gptq_loss": 1.0}).train_version().number == 1


PREFIX = "merged.0 merged.1 merged.2 merged.3"


def test_no_version_is_registered_when_the_quantized_free_text_model_is_broken(make: Make) -> None:
    """The double answers with its weights' name, which is close to the references if they are the merged ones."""
    heldout = tuple(make_example(f"write {place}", f"{PREFIX} and more of {place}") for place in range(20))
    with pytest.raises(TrainingError, match=r"GPTQ lowered ROUGE-L by 0\.\d+"):
        make(heldout).train_version()


def test_changing_the_metrics_reuses_the_stored_answers(make: Make, stages: Stages, engines: Engines) -> None:
    version = make().train_version()
    ran, launched = len(stages.ran), len(engines.launched)
    pipeline = make(evaluate={"metrics": ["chrf", "exact_match"]})
    other = pipeline.train_version()
    assert (len(stages.ran), len(engines.launched)) == (ran, launched)
    assert other.number == version.number + 1
    manifest = pipeline.registry.manifest(other)
    report = manifest.formats[Format.MERGED].evaluation
    assert report is not None and manifest.base_evaluation is not None
    assert list(report.figures) == list(manifest.base_evaluation.figures) == ["chrf", "exact_match"]
    assert set(pipeline.registry.results(other, Format.MERGED)[0].scores) == {"chrf", "exact_match"}


def test_run_fails_before_training_if_a_metric_function_fails(make: Make, stages: Stages, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(answers, references):\n    return []\n", "utf-8")
    with pytest.raises(RecipeError, match="0 scores for 2 answers"):
        make(evaluate={"metrics": f"{path}:score"}).train_version()
    assert stages.ran == []


def test_answers_are_scored_again_after_a_metric_function_is_fixed(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    values = []
    for score in (0.25, 0.75):
        path.write_text(f"def score(answers, references):\n    return [{score}] * len(answers)\n", "utf-8")
        pipeline = make(evaluate={"metrics": f"{path}:score"})
        report = pipeline.registry.manifest(pipeline.train_version()).formats[Format.MERGED].evaluation
        assert report is not None
        values.append(report.figures["mine_score"].estimate.value)
    assert values == [0.25, 0.75]


def test_judge_runs_once_and_its_verdict_is_stored_with_the_version(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "judge.key"
    key.write_text("secret\n")
    key.chmod(0o600)
    with judge_server(lambda first, second: "A" if first.startswith("merged") else "B") as server:
        judge = {"url": server.url, "model": "wise", "key_file": str(key)}
        make(WORSE_QUANTIZED, judge=judge, evaluate={"max_gptq_loss": 1.0}).train_version()
        asked = len(server.requests)
        pipeline = make(WORSE_QUANTIZED, judge=judge, evaluate={"max_gptq_loss": 1.0, "metrics": "exact_match"})
        report = pipeline.registry.manifest(pipeline.train_version()).judge
    assert (asked, len(server.requests), set(server.keys)) == (14, 14, {"Bearer secret"})
    assert report is not None
    assert (report.model, report.pairs, report.win_rate.value, report.agreement.value) == ("wise", 7, 1.0, 1.0)
    assert server.url in capsys.readouterr().err


def test_version_has_no_judge_verdict_when_no_judge_is_configured(make: Make) -> None:
    pipeline = make()
    assert pipeline.registry.manifest(pipeline.train_version()).judge is None


def test_run_fails_before_training_if_other_users_can_read_the_judge_key(
    make: Make, stages: Stages, tmp_path: Path
) -> None:
    key = tmp_path / "judge.key"
    key.write_text("secret")
    key.chmod(0o644)
    with pytest.raises(SettingsError, match="can be read by other users"):
        make(judge={"url": "http://127.0.0.1:1/v1", "model": "wise", "key_file": str(key)}).train_version()
    assert stages.ran == []
