"""Tests that prompts on one topic are close, any text has a position, and no training text is recoverable."""

import io
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svc.drift_reference import text_embedding
from svc.drift_reference.text_embedding import (
    Floats,
    TextSpace,
    fit_text_space,
    head_and_tail,
    load_text_space,
    save_text_space,
)
from svc.errors import IntegrityError

PLANTS = ["roses need water", "water the tulips", "tulips and roses in the garden", "a garden with roses"]
TRAINS = ["the train is late", "a late train to Berlin", "which train goes to Paris", "trains from Paris to Berlin"]
PROMPTS, ANSWERS = [*PLANTS, *TRAINS], ["plant"] * 4 + ["train"] * 4
ODD = ["", " ", "\0", "😀👩‍👩‍👧", "123 !?", "नमस्ते दुनिया", "a\u0301" * 9, "\u202e\ufeff"]


def space() -> TextSpace:
    return fit_text_space(PROMPTS, ANSWERS)


def distance(ones: Floats, others: Floats) -> float:
    return float(np.linalg.norm(ones[:, None] - others[None], axis=2).mean())


def save(folder: Path, made: TextSpace) -> Path:
    save_text_space(folder / "space.npz", made)
    return folder / "space.npz"


def archive(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def assert_same_place(one: TextSpace, other: TextSpace, prompts: list[str]) -> None:
    """Assert that the positions of prompts agree within the error of half precision."""
    found, again = one.embed(prompts), other.embed(prompts)
    assert found.topic == pytest.approx(again.topic, abs=2e-3)
    assert found.answer == pytest.approx(again.answer, abs=2e-3)


@pytest.mark.parametrize("view", ["topic", "answer"])
def test_embeddings_of_prompts_on_different_topics_are_far_apart(view: str) -> None:
    fitted = space()
    plants = getattr(fitted.embed(["water for the garden", "my tulips", "roses, roses"]), view)
    trains = getattr(fitted.embed(["the next train", "to Berlin by train", "Paris is late"]), view)
    assert distance(plants, trains) > 1.2 * max(distance(plants, plants), distance(trains, trains))


def test_answer_embedding_separates_prompts_by_expected_answer() -> None:
    # The prompts differ in one word, which decides the answer.
    prompts = [f"{first} {rest} please" for rest in ("one", "two", "three", "four") for first in ("sell", "keep")]
    fitted = fit_text_space(prompts, ["yes", "no"] * 4)
    same, other = fitted.embed(["sell five please", "sell six please"]), fitted.embed(["keep five please"])

    def told(ones: Floats, others: Floats) -> float:
        return distance(ones, others) / distance(ones[:1], ones[1:])

    assert told(same.answer, other.answer) > 1.2 * told(same.topic, other.topic)


def test_fitting_a_text_space_is_deterministic() -> None:
    one, other = space(), space()
    assert all((getattr(one, field.name) == getattr(other, field.name)).all() for field in fields(TextSpace))


def test_loaded_text_space_gives_the_same_results_as_the_saved_one(tmp_path: Path) -> None:
    fitted = space()
    loaded = load_text_space(save(tmp_path, fitted))
    assert_same_place(fitted, loaded, [*PROMPTS, "a rose on a train", *ODD])
    assert fitted.unknown_words(PROMPTS).tolist() == loaded.unknown_words(PROMPTS).tolist()


def test_loaded_text_space_keeps_array_types_and_shapes(tmp_path: Path) -> None:
    fitted = space()
    loaded = load_text_space(save(tmp_path, fitted))
    for field in fields(TextSpace):
        one, other = getattr(fitted, field.name), getattr(loaded, field.name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)


def test_words_absent_from_the_training_examples_are_treated_as_unknown() -> None:
    assert space().unknown_words(["Roses and trains", "roses elephant", "elephant"]).tolist() == [0, 0.5, 1]


def test_repeated_word_counts_once_toward_the_unknown_word_share() -> None:
    assert space().unknown_words(["elephant elephant roses"]).tolist() == [0.5]


@pytest.mark.parametrize("text", ["", "12 !?", "😀"])
def test_text_without_words_has_an_unknown_word_share_of_zero(text: str) -> None:
    assert space().unknown_words([text]).tolist() == [0]


@pytest.mark.parametrize("text", ODD)
def test_any_text_has_a_finite_embedding(text: str) -> None:
    embedding = space().embed([text])
    assert np.isfinite(embedding.topic).all() and np.isfinite(embedding.answer).all()


def test_embedding_of_an_empty_text_is_zero() -> None:
    assert (space().embed([""]).topic == 0).all()


def test_embedding_ignores_case() -> None:
    fitted = space()
    assert_same_place(fitted, fitted, ["ROSES NEED WATER"])
    assert fitted.embed(["ROSES"]).topic == pytest.approx(fitted.embed(["roses"]).topic)


def test_only_the_beginning_and_end_of_a_long_text_are_embedded() -> None:
    made, ends = space(), "water the tulips in " * 100
    one, other = made.embed([ends + "train " * 200_000 + ends]), made.embed([ends + ends])
    assert (one.topic == other.topic).all()
    assert made.unknown_words([ends + " elephant " + ends]).tolist() == [0]
    assert made.unknown_words([ends + " elephant"])[0] > 0


@pytest.mark.parametrize("length", [0, 1, 1999, 2000, 2001, 2002, 5000])
def test_middle_is_removed_only_from_long_texts(length: int) -> None:
    text = "".join(chr(0x4E00 + place) for place in range(length))
    assert head_and_tail(text) == (text if length <= 2000 else f"{text[:1000]}\n{text[-1000:]}")


def test_text_space_is_fitted_on_beginnings_and_ends_of_long_examples() -> None:
    middle = " elephant" * 1000
    fitted = fit_text_space([f"{prompt}{' a' * 600}{middle}{' a' * 600} {prompt}" for prompt in PROMPTS], ANSWERS)
    assert fitted.unknown_words(["roses elephant"]).tolist() == [0.5]


def test_words_of_a_sentence_without_spaces_are_recognized_individually() -> None:
    fitted = fit_text_space(["我的包裹在哪里", "我要退款", "包裹坏了"], ["where", "money", "broken"])
    assert fitted.unknown_words(["我的包裹坏了", "我的狗", "大象"]).tolist() == pytest.approx([0, 1 / 3, 1])


@pytest.mark.parametrize("prompts", [[], ["roses"], ["roses", "", "trains"]])
def test_embedding_has_one_row_per_prompt(prompts: list[str]) -> None:
    fitted = space()
    embedding = fitted.embed(prompts)
    assert len(embedding.topic) == len(embedding.answer) == len(fitted.unknown_words(prompts)) == len(prompts)


@pytest.mark.slow
@settings(max_examples=15)
@given(st.lists(st.sampled_from([*PROMPTS, *ODD]) | st.text(max_size=15), min_size=3, max_size=6, unique=True))
def test_text_embedding_can_be_fitted_on_few_arbitrary_examples(prompts: list[str]) -> None:
    prompts = [*prompts, "which train goes", "roses need water"]
    works(fit_text_space(prompts, [str(place) for place in range(len(prompts))]))


@pytest.mark.parametrize(
    ("prompts", "answers"),
    [
        pytest.param(["roses"], ["plant"], id="one example"),
        pytest.param([""], [""], id="one empty example"),
        pytest.param(["roses", "trains"], ["plant", "plant"], id="two examples with equal answers"),
        pytest.param(PROMPTS, ["same"] * 8, id="equal answers"),
        pytest.param(PROMPTS, [""] * 8, id="empty answers"),
        pytest.param(PROMPTS, [*[""] * 7, "a"], id="one answer"),
        pytest.param(["roses", "trains"], ["plant", "train"], id="two examples"),
        pytest.param(["roses"] * 8, ANSWERS, id="equal prompts"),
        pytest.param([""] * 8, ANSWERS, id="empty prompts"),
        pytest.param(PROMPTS, ["", " "] * 4, id="blank answers"),
    ],
)
def test_text_space_can_be_fitted_on_very_few_or_identical_examples(prompts: list[str], answers: list[str]) -> None:
    works(fit_text_space(prompts, answers))


def works(made: TextSpace) -> None:
    embedding = made.embed(["roses", "a train", ""])
    assert (embedding.topic.ndim, embedding.answer.ndim) == (2, 2)
    assert np.isfinite(embedding.topic).all() and np.isfinite(embedding.answer).all()


def test_answer_embedding_has_no_dimensions_when_all_answers_are_equal() -> None:
    assert fit_text_space(PROMPTS, ["same"] * 8).embed(PROMPTS).answer.shape == (8, 0)


def test_text_embedding_is_fitted_on_evenly_spaced_examples_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_embedding, "_MAX_EXAMPLES", 4)
    few = space()
    monkeypatch.undo()
    assert 1 < few.axes.shape[0] < space().axes.shape[0]
    # They come from the whole file.
    assert few.unknown_words(["roses", "train"]).tolist() == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-32-le"])
def test_embedding_file_contains_no_readable_training_text(tmp_path: Path, encoding: str) -> None:
    prompts = [*PROMPTS, "my name is Featherstonehaugh"]
    answers = [*ANSWERS, "Cholmondeley"]
    file = save(tmp_path, fit_text_space(prompts, answers))
    with np.load(file, allow_pickle=False) as arrays:
        content = file.read_bytes() + b"".join(arrays[name].tobytes() for name in arrays)
    words = {word for text in [*prompts, *answers] for word in text.split() if len(word) > 4}
    forms = {form for word in words for form in (word, word.lower(), word.upper())}
    assert [form for form in forms if form.encode(encoding) in content] == []


def test_missing_embedding_file_raises_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="no-such"):
        load_text_space(tmp_path / "no-such.npz")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"this is no archive", id="text"),
        pytest.param(archive(idf=np.zeros(3)), id="an array is missing"),
        pytest.param(
            archive(**{field.name: np.array([{}], dtype=object) for field in fields(TextSpace)}), id="pickled objects"
        ),
        pytest.param(b"", id="empty"),
        pytest.param(b"PK\x03\x04 cut off", id="cut off"),
        pytest.param(b"\x93NUMPY\x01\x00\x10\x00{}            \n", id="a bad header"),
    ],
)
def test_error_names_a_file_that_is_not_a_text_embedding(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "space.npz").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"space\.npz"):
        load_text_space(tmp_path / "space.npz")


def test_text_embedding_file_in_npy_instead_of_npz_format_is_rejected(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    (tmp_path / "space.npz").write_bytes(file.getvalue())
    with pytest.raises(IntegrityError):
        load_text_space(tmp_path / "space.npz")


@pytest.mark.slow
def test_corrupt_embedding_file_is_rejected_or_loaded_without_a_crash(tmp_path: Path) -> None:
    whole = save(tmp_path, space()).read_bytes()
    generator = random.Random(1)
    for _ in range(150):
        damaged = bytearray(whole[: generator.choice([generator.randrange(len(whole)), len(whole)])])
        for _ in range(3):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "space.npz").write_bytes(damaged)
        try:
            load_text_space(tmp_path / "space.npz")
        except IntegrityError:
            continue
