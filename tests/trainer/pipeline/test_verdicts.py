"""Checks that a version fails: it becomes none, or one that says so."""

from dataclasses import replace

import pytest

from svc.errors import TrainingError
from svc.version import Format
from tests.svc.registry.parity import make_parity
from tests.trainer.engines import Engines
from tests.trainer.pipeline.stand_ins import WORSE_QUANTIZED, Make, Stages
from trainer.pipeline.stage_key import Stage

pytestmark = pytest.mark.slow


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


def test_a_quantized_model_that_is_worse_becomes_no_version(make: Make) -> None:
    pipeline = make(WORSE_QUANTIZED)
    with pytest.raises(TrainingError, match=r"GPTQ lost 1\.000 of exact match"):
        pipeline.train_version()
    assert pipeline.registry.versions() == []
    assert not pipeline.run.done(Stage.REGISTER)


def test_a_loss_that_the_recipe_allows_becomes_a_version(make: Make) -> None:
    assert make(WORSE_QUANTIZED, evaluate={"max_gptq_loss": 1.0}).train_version().number == 1
