"""Tests that prompt features are those a person would count, for both live and held-out prompts."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svc.drift_reference.prompt import Prompt, PromptFeature, PromptSampler, language
from svc.drift_reference.sample import Sample
from svc.drift_reference.text_embedding import WORD, fit_text_space

SYSTEM = "You sort parcels."
TRAINING = ["Where is my parcel?", "When does the parcel come?", "I want my money back", "The parcel is broken"]
SHARES = (PromptFeature.DISTINCT_WORDS, PromptFeature.UNKNOWN_WORDS, PromptFeature.SYMBOLS)
ODD = [
    "",
    " \n\t",
    "\0",
    "😀👩‍👩‍👧\u200d",
    "123 456",
    "!?",
    "नमस्ते",
    "ÉCOLE_école",
    "Ǆ" * 40,
    "a" * 30_000,
    "\u202e\ufeff",
]

sampler = PromptSampler(fit_text_space(TRAINING, ["place", "time", "money", "money"]))
prompts = st.builds(
    Prompt, st.text(max_size=40) | st.sampled_from(ODD), st.integers(1, 9), st.sampled_from(["", SYSTEM, "Be brief."])
)


def number(text: str, feature: PromptFeature) -> float:
    return float(sampler.sample([Prompt(text)]).numbers[feature][0])


def category(prompt: Prompt, feature: PromptFeature) -> str:
    return str(sampler.sample([prompt]).categories[feature][0])


@pytest.mark.parametrize(
    ("feature", "text", "value"),
    [
        (PromptFeature.CHARACTERS, "Where is it?", 12),
        (PromptFeature.CHARACTERS, "", 0),
        (PromptFeature.DISTINCT_WORDS, "my parcel is my PARCEL", 3 / 5),
        (PromptFeature.DISTINCT_WORDS, "12 !", 0),
        (PromptFeature.UNKNOWN_WORDS, "Where is the elephant", 1 / 4),
        (PromptFeature.UNKNOWN_WORDS, "elephant elephant parcel", 1 / 2),
        (PromptFeature.UNKNOWN_WORDS, "12 !", 0),
        (PromptFeature.WORD_LENGTH, "a bcd 123", 2),
        (PromptFeature.WORD_LENGTH, "", 0),
        (PromptFeature.SYMBOLS, "a! b?", 2 / 5),
        (PromptFeature.SYMBOLS, "a b1", 0),
        (PromptFeature.SYMBOLS, "😀", 1),
        (PromptFeature.SYMBOLS, "", 0),
    ],
)
def test_numeric_features_match_manual_counts(feature: PromptFeature, text: str, value: float) -> None:
    assert number(text, feature) == pytest.approx(value)


def test_turn_count_feature_equals_the_number_of_conversation_turns() -> None:
    assert sampler.sample([Prompt("a", turns=3)]).numbers[PromptFeature.TURNS].tolist() == [3]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Where is my parcel? I have been waiting for it since Monday.", "en"),
        ("Wo ist mein Paket? Ich warte seit Montag darauf.", "de"),
        ("Où est mon colis ? Je l'attends depuis lundi.", "fr"),
    ],
)
def test_sentence_language_is_detected(text: str, code: str) -> None:
    assert language(text) == code


def test_middle_of_a_long_text_does_not_affect_its_language() -> None:
    english = "Where is my parcel? I have been waiting for it. " * 50
    assert language(english + "Wo ist mein Paket? " * 1000 + english) == language(english)


def test_middle_of_a_long_prompt_affects_only_its_character_count() -> None:
    head, tail = "a parcel " * 200, "the money " * 200
    short, long = (sampler.sample([Prompt(head + middle + tail)]) for middle in ("", "elephant! " * 9_000))
    assert long.numbers[PromptFeature.CHARACTERS][0] == short.numbers[PromptFeature.CHARACTERS][0] + 90_000
    same(replace(long, numbers={**long.numbers, PromptFeature.CHARACTERS: short.numbers["characters"]}), short)


def test_end_of_a_long_prompt_affects_its_features() -> None:
    context = "the parcel is in the cellar " * 200
    one, other = (sampler.sample([Prompt(context + question)]) for question in ("Where is it?", "Elephants, please!"))
    assert one.numbers[PromptFeature.UNKNOWN_WORDS][0] < other.numbers[PromptFeature.UNKNOWN_WORDS][0]
    assert np.abs(one.views[0] - other.views[0]).max() > 0.001


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("我的包裹在哪里。", "我 的 包 裹 在 哪 里", id="Chinese"),
        pytest.param("荷物はどこですか。", "荷 物 は ど こ で す か", id="Japanese"),
        pytest.param("パーセルはｺｺです", "パ ー セ ル は ｺ ｺ で す", id="Japanese in katakana"),
        pytest.param("พัสดุอยู่ที่ไหน", "พั ส ดุ อ ยู่ ที่ ไ ห น", id="Thai"),
        pytest.param("ພັດສະດຸຢູ່ໃສ", "ພັ ດ ສ ະ ດຸ ຢູ່ ໃ ສ", id="Lao"),
        pytest.param("កញ្ចប់នៅឯណា?", "ក ញ្ ច ប់ នៅ ឯ ណា", id="Khmer"),
        pytest.param("ပါဆယ်ဘယ်မှာလဲ။", "ပါ ဆ ယ် ဘ ယ် မှာ လဲ", id="Burmese"),
        pytest.param("Wo ist 我的 Paket 7?", "Wo ist 我 的 Paket", id="two scripts"),
    ],
)
def test_each_letter_is_a_word_in_writing_systems_without_spaces(text: str, words: str) -> None:
    assert re.findall(WORD, text) == words.split()


@pytest.mark.parametrize(
    "text",
    [
        "소포가 어디에 있나요?",
        "Wo ist mein Päckchen?",
        "Где моя посылка?",
        "أين طردي؟",
        "איפה החבילה שלי",
        "Πού είναι;",
    ],
)
def test_word_is_a_run_of_letters_in_writing_systems_with_spaces(text: str) -> None:
    assert re.findall(WORD, text) == re.findall(r"[^\W\d_]+", text) == text.rstrip("?؟;").split()


def test_system_prompts_with_a_common_prefix_are_distinguished() -> None:
    systems = ["", SYSTEM, SYSTEM + " Be brief.", "Be brief."]
    assert len({category(Prompt("a", system=system), PromptFeature.SYSTEM_PROMPT) for system in systems}) == 4


@pytest.mark.slow
@settings(max_examples=25)
@given(st.lists(prompts, min_size=1, max_size=3), st.lists(prompts, max_size=2))
def test_prompt_features_do_not_depend_on_the_other_prompts_in_a_sample(
    ones: list[Prompt], others: list[Prompt]
) -> None:
    same(sampler.sample([*ones, *others]), sampler.sample(ones).followed_by(sampler.sample(others)))


@pytest.mark.slow
@settings(max_examples=25)
@given(prompts)
def test_prompt_features_are_finite_and_proportions_are_between_0_and_1(prompt: Prompt) -> None:
    sample = sampler.sample([prompt])
    assert all(np.isfinite(values).all() for values in [*sample.numbers.values(), *sample.views])
    assert all(0 <= sample.numbers[feature][0] <= 1 for feature in SHARES)


def test_all_prompt_features_are_computed() -> None:
    sample = sampler.sample([Prompt("a")])
    assert {*sample.numbers, *sample.categories} == set(PromptFeature)


def test_sample_of_no_prompts_is_empty() -> None:
    empty, one = sampler.sample([]), sampler.sample([Prompt("a")])
    assert empty.size == 0
    same(empty.followed_by(one), one)


def test_word_order_does_not_affect_prompt_features() -> None:
    one, other = (sampler.sample([Prompt(text)]) for text in ("parcel where", "where parcel"))
    same(replace(one, views=()), replace(other, views=()))


def test_prompt_features_can_be_computed_for_a_one_megabyte_text() -> None:
    sample = sampler.sample([Prompt("parcel " * 150_000)])
    assert sample.numbers[PromptFeature.CHARACTERS][0] == 1_050_000


def same(one: Sample, other: Sample) -> None:
    assert one.size == other.size
    assert (one.numbers.keys(), one.categories.keys()) == (other.numbers.keys(), other.categories.keys())
    for name, values in one.numbers.items():
        assert values == pytest.approx(other.numbers[name])
    for name, found in one.categories.items():
        assert found.tolist() == other.categories[name].tolist()
    for view, another in zip(one.views, other.views, strict=True):
        assert view == pytest.approx(another, abs=1e-6)
