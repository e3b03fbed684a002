"""Tests the names of fine-tuned models."""

import pytest

from serving.models.fine_tuned_name import FineTunedName, make_fine_tuned_name, parse_fine_tuned_name

JOB = "ftjob-0123456789abcdef01234567"


def make(model: str, suffix: str = "tickets") -> str:
    return str(make_fine_tuned_name(model=model, organization="org", suffix=suffix, job=JOB))


def test_fine_tuned_name_follows_the_openai_format_and_ends_with_a_short_job_id() -> None:
    assert make("small") == "ft:small:org:tickets:0123456789ab"


def test_fine_tuned_name_has_an_empty_suffix_when_the_client_chose_none() -> None:
    assert make("small", "") == "ft:small:org::0123456789ab"


@pytest.mark.parametrize("model", ["ft:small:org:first:ab12", "ft:small:org::ab12", "ft:small:org::ab12:ckpt-step-10"])
def test_model_fine_tuned_again_is_named_after_its_original_base(model: str) -> None:
    assert make(model) == "ft:small:org:tickets:0123456789ab"


@pytest.mark.parametrize("suffix", ["", "tickets"])
@pytest.mark.parametrize("step", [None, 1, 2000])
def test_fine_tuned_name_round_trips_through_parsing(suffix: str, step: int | None) -> None:
    name = FineTunedName("HuggingFaceTB/SmolLM2-135M", "org", suffix, "ab12", step)
    assert parse_fine_tuned_name(str(name)) == name


def test_checkpoint_name_is_the_model_name_followed_by_the_step() -> None:
    assert str(FineTunedName("small", "org", "", "ab12").at_step(20)) == "ft:small:org::ab12:ckpt-step-20"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "small",
        "ft:",
        "ft:a:b:c",
        "ft::org:x:1",
        "ft:a::x:1",
        "ft:a:b:c:",
        "ft:a:b:c:1:ckpt-step-0",
        "ft:a:b:c:1:step-1",
        "ft:a:b:c:1:ckpt-step-1:2",
    ],
)
def test_malformed_name_is_not_parsed_as_a_fine_tuned_name(text: str) -> None:
    assert parse_fine_tuned_name(text) is None
