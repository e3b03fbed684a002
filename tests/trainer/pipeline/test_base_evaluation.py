"""Tests that a base is evaluated only once on the same examples."""

from dataclasses import replace

import pytest

from svc.version import Format
from tests.trainer.conftest import make_example
from tests.trainer.engines import Engines
from tests.trainer.pipeline.stand_ins import Make
from trainer.base_model.find_base import merged_revision
from trainer.base_model.resolve import Base

pytestmark = pytest.mark.slow


def test_base_is_not_reevaluated_on_the_same_examples(make: Make, engines: Engines) -> None:
    first = make()
    asked = first.registry.manifest(first.train_version()).base_evaluation
    assert asked is not None
    launched = len(engines.launched)
    again = make(train={"seed": 1})
    known = again.registry.manifest(again.train_version()).base_evaluation
    assert "base" not in engines.started_with[launched:]
    assert known == asked.model_copy(update={"seconds": 0.0})


def test_base_is_reevaluated_when_the_examples_differ(make: Make, engines: Engines) -> None:
    make().train_version()
    launched = len(engines.launched)
    make(heldout=(make_example("three", "red"),)).train_version()
    assert engines.started_with[launched] == "base"


def test_base_is_not_evaluated_if_it_is_a_registered_version(make: Make, engines: Engines) -> None:
    first = make()
    version = first.train_version()
    manifest, launched = first.registry.manifest(version), len(engines.launched)
    folder = first.registry.artifact(version, Format.MERGED)
    second = replace(make(train={"seed": 1}), base=Base(folder, str(version), None, merged_revision(manifest)))
    evaluation = second.registry.manifest(second.train_version()).base_evaluation
    assert str(folder) not in [engine.double.weights for engine in engines.launched[launched:]]
    merged = manifest.formats[Format.MERGED].evaluation
    assert merged is not None
    assert evaluation is not None
    assert evaluation.hits == merged.hits
