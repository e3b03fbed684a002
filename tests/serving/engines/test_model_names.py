"""Tests the names under which a model and its versions are available."""

import pytest

from serving.admission.errors import EngineUnavailableError
from serving.engines.model_names import ModelNames, ModelNotFoundError
from tests.serving.service import ONE, TWO


def names() -> ModelNames:
    model_names = ModelNames("tuned", clock=lambda: 7.9)
    model_names.serve(ONE)
    model_names.loaded = {ONE}
    return model_names


@pytest.mark.parametrize("model", ["tuned", "tuned@production"])
def test_name_resolves_to_the_served_version(model: str) -> None:
    assert names().resolve(model) is None


def test_model_name_with_a_version_number_resolves_to_that_version() -> None:
    assert names().resolve("tuned@1") == ONE.version


def test_both_versions_are_served_during_a_swap_of_several_engines() -> None:
    model_names = names()
    model_names.loaded = {ONE, TWO}
    assert model_names.all() == ("tuned", "tuned@1", "tuned@2", "tuned@production")
    assert model_names.resolve("tuned@2") == TWO.version


def test_unknown_names_are_rejected_with_a_list_of_served_names() -> None:
    for model in ("", "other", "tuned@2", "tuned@candidate", "tuned@", "tuned@01", "TUNED", " tuned"):
        with pytest.raises(ModelNotFoundError) as caught:
            names().resolve(model)
        assert "tuned, tuned@1, tuned@production" in caught.value.expected, model


def test_after_a_swap_only_names_of_the_new_version_are_known() -> None:
    model_names = names()
    model_names.serve(TWO)
    model_names.loaded = {TWO}
    assert model_names.all() == ("tuned", "tuned@2", "tuned@production")
    with pytest.raises(ModelNotFoundError):
        model_names.resolve("tuned@1")


def test_long_model_name_is_truncated_in_the_error() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        names().resolve("x" * 10_000)
    assert len(caught.value.wrong) < 200


def test_model_is_unavailable_before_its_first_version_is_loaded() -> None:
    with pytest.raises(EngineUnavailableError):
        ModelNames("tuned").resolve("tuned")


def test_model_load_time_is_a_whole_number_of_seconds() -> None:
    assert names().since == 7


def test_request_assigned_to_a_candidate_is_routed_to_production_if_the_candidate_engine_died() -> None:
    model_names = names()
    model_names.candidate = TWO.version
    model_names.loaded = {ONE, TWO}
    assert model_names.resolve(model_names.assigned) == model_names.resolve("tuned@candidate") == TWO.version
    model_names.loaded = {ONE}  # its engine died
    assert model_names.resolve(model_names.assigned) is None
    with pytest.raises(ModelNotFoundError):
        model_names.resolve("tuned@candidate")


def test_request_assigned_to_a_candidate_is_routed_to_production_if_the_rollout_has_ended() -> None:
    model_names = names()
    assert model_names.resolve(model_names.assigned) is None
