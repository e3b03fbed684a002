"""Names of one model that clients use, and what they mean."""

import pytest

from serving.admission.errors import EngineUnavailableError
from serving.model_names import ModelNames, ModelNotFoundError
from tests.serving.service import ONE, TWO


def names() -> ModelNames:
    found = ModelNames("tuned", clock=lambda: 7.9)
    found.serve(ONE)
    found.set_loaded({ONE})
    return found


@pytest.mark.parametrize("model", ["tuned", "tuned@production"])
def test_the_name_means_whatever_serves(model: str) -> None:
    assert names().resolve(model) is None


def test_a_number_means_that_version() -> None:
    assert names().resolve("tuned@1") == ONE.version


def test_during_a_swap_of_several_engines_both_versions_are_served() -> None:
    found = names()
    found.set_loaded({ONE, TWO})
    assert found.all() == ("tuned", "tuned@1", "tuned@2", "tuned@production")
    assert found.resolve("tuned@2") == TWO.version


@pytest.mark.parametrize("model", ["", "other", "tuned@2", "tuned@candidate", "tuned@", "tuned@01", "TUNED", " tuned"])
def test_other_names_are_refused_with_the_names_that_are_served(model: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        names().resolve(model)
    assert "tuned, tuned@1, tuned@production" in caught.value.expected


def test_after_a_swap_the_old_number_is_unknown_and_the_name_means_the_new_one() -> None:
    found = names()
    found.serve(TWO)
    found.set_loaded({TWO})
    assert found.all() == ("tuned", "tuned@2", "tuned@production")
    with pytest.raises(ModelNotFoundError):
        found.resolve("tuned@1")


def test_a_long_name_is_cut_in_the_error() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        names().resolve("x" * 10_000)
    assert len(caught.value.wrong) < 200


def test_before_the_first_version_there_is_no_engine() -> None:
    with pytest.raises(EngineUnavailableError):
        ModelNames("tuned").resolve("tuned")


def test_the_time_of_loading_is_kept_in_whole_seconds() -> None:
    assert names().since == 7
