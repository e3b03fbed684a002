"""Tests which of a run's examples are trained on, which are held out, and which data are rejected."""

import gzip
import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from svc.dataset import stored_examples
from svc.dataset.prompt_hashes import NO_PROMPTS, PromptHashes, hash_prompts
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.preferences import write_pairs
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample, parse_example
from svc.dataset.schema.preference import PreferencePair
from svc.dataset.stored_examples import StoredExamples
from svc.errors import DataError
from svc.registry.manifest import SelectedBy
from tests.svc.dataset.rows import text
from tests.trainer.conftest import make_example, make_recipe
from trainer.pipeline.examples import Examples, read_run_examples


def read(folder: Path, train: list[ChatExample], heldout: list[ChatExample], **data: Any) -> Examples:
    write_examples(folder / "t.jsonl", train)
    write_examples(folder / "h.jsonl", heldout)
    paths = {"train": folder / "t.jsonl", "heldout": folder / "h.jsonl"}
    return read_run_examples(make_recipe(data={**paths, **data}))


TRAIN = [make_example(f"question {number}", "yes") for number in range(6)]
HELDOUT = [make_example("another", "no")]


def test_training_and_heldout_sets_have_different_fingerprints(tmp_path: Path) -> None:
    examples = read(tmp_path, TRAIN, HELDOUT)
    assert examples.train == tuple(TRAIN)
    assert examples.heldout == tuple(HELDOUT)
    assert examples.train_fingerprint != examples.heldout_fingerprint


@pytest.mark.slow
def test_examples_stored_on_disk_equal_examples_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"question {number % 50} about {text(random.Random(number))}" for number in range(120)]
    lines = [make_example(prompt, f"answer {number}") for number, prompt in enumerate(prompts)]
    write_examples(tmp_path / "t.jsonl", lines)
    write_examples(tmp_path / "g.jsonl", [make_example(f"general {number}", "yes") for number in range(40)])
    data = {"train": tmp_path / "t.jsonl", "general": tmp_path / "g.jsonl", "skip": 3, "limit": 90}
    recipe = make_recipe(data=data, evaluate={"limit": 4})
    in_memory = read_run_examples(recipe)
    monkeypatch.setattr(stored_examples, "MAX_IN_MEMORY", 20)
    on_disk = read_run_examples(recipe)
    assert isinstance(on_disk.train, StoredExamples) and isinstance(on_disk.given, StoredExamples)
    for name in ("train", "heldout", "given"):
        assert list(getattr(on_disk, name)) == list(getattr(in_memory, name)), name
    assert on_disk.train_fingerprint == in_memory.train_fingerprint
    assert on_disk.heldout_fingerprint == in_memory.heldout_fingerprint
    assert on_disk.general == in_memory.general > 0


@pytest.mark.parametrize(("objective", "rest"), [("text", "is a chat"), ("sft", "is a document without turns")])
def test_documents_for_a_chat_recipe_and_chats_for_a_document_recipe_are_rejected(
    tmp_path: Path, objective: str, rest: str
) -> None:
    documents = [ChatExample.of_document(f"text {number}") for number in range(6)]
    write_examples(tmp_path / "t.jsonl", TRAIN if objective == "text" else documents)
    recipe = make_recipe(objective=objective, data={"train": tmp_path / "t.jsonl"})
    with pytest.raises(DataError, match=rf"example 1 of .*t.jsonl {rest}"):
        read_run_examples(recipe)


def test_documents_are_split_into_training_and_heldout_documents(tmp_path: Path) -> None:
    documents = [ChatExample.of_document(text(random.Random(number))) for number in range(40)]
    write_examples(tmp_path / "t.jsonl", documents)
    examples = read_run_examples(make_recipe(objective="text", data={"train": tmp_path / "t.jsonl"}))
    assert len(examples.heldout) > 0 and len(examples.train) + len(examples.heldout) == 40
    assert examples.questions is None


def test_modification_time_of_the_training_file_is_recorded_with_the_examples(tmp_path: Path) -> None:
    write_examples(tmp_path / "t.jsonl", TRAIN)
    os.utime(tmp_path / "t.jsonl", (86_400, 86_400))
    examples = read_run_examples(make_recipe(data={"train": tmp_path / "t.jsonl"}))
    assert examples.modified_at == datetime(1970, 1, 2, tzinfo=UTC)


def test_skip_and_limit_keys_select_a_subset_of_training_examples(tmp_path: Path) -> None:
    assert read(tmp_path, TRAIN, HELDOUT, skip=1, limit=3).train == tuple(TRAIN[1:4])


def test_all_answers_of_a_conversation_are_trained_on_unless_the_recipe_selects_the_last_answer(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    long = parse_example({"messages": [{"role": role, "content": text} for role, text in turns]})
    train = [*TRAIN, long]
    examples = read(tmp_path, train, HELDOUT)
    assert [example.learnt for example in examples.train] == [(2,)] * 6 + [(1, 3)]
    last = read(tmp_path, train, HELDOUT, learn="last")
    assert last.train == tuple(train)
    assert last.train_fingerprint != examples.train_fingerprint


def test_heldout_prompt_inside_a_training_conversation_counts_as_a_leak(tmp_path: Path) -> None:
    turns = [*HELDOUT[0].as_dict()["messages"], {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    train = [*TRAIN, parse_example({"messages": turns})]
    with pytest.raises(DataError, match="1 training examples have the same prompt"):
        read(tmp_path, train, HELDOUT)
    bad_lines = BadLines(tmp_path / "bad")
    recipe = make_recipe(data={"train": tmp_path / "t.jsonl", "heldout": tmp_path / "h.jsonl"})
    assert read_run_examples(recipe, bad_lines=bad_lines).train == tuple(TRAIN)


def test_training_fingerprint_differs_when_only_a_subset_of_examples_is_used(tmp_path: Path) -> None:
    whole, part = read(tmp_path, TRAIN, HELDOUT), read(tmp_path, TRAIN, HELDOUT, limit=3)
    assert whole.train_fingerprint != part.train_fingerprint


def test_skipping_all_but_one_training_example_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves only 1 of 6 examples"):
        read(tmp_path, TRAIN, HELDOUT, skip=5)


def test_training_file_with_only_one_example_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found only 1 example in .*t\.jsonl"):
        read(tmp_path, TRAIN[:1], HELDOUT)


def test_empty_heldout_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found only 0 examples in .*h\.jsonl"):
        read(tmp_path, TRAIN, [])


def test_heldout_file_containing_a_training_prompt_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="1 training examples have the same prompt as a held-out example; the first is example 3"
    ):
        read(tmp_path, TRAIN, [make_example("Question  2", "no")])


def lines_of(count: int, prompt: str = "question") -> list[ChatExample]:
    return [make_example(f"{prompt} {number}", "yes") for number in range(count)]


def read_train(folder: Path, examples: list[ChatExample], **data: Any) -> Examples:
    write_examples(folder / "t.jsonl", examples)
    return read_run_examples(make_recipe(data={"train": folder / "t.jsonl", **data}))


VALIDATION = [make_example("a third", "yes"), make_example("a fourth", "no")]


def read_validation(folder: Path, validation: list[ChatExample], **sections: Any) -> Examples:
    write_examples(folder / "t.jsonl", TRAIN)
    write_examples(folder / "h.jsonl", HELDOUT)
    write_examples(folder / "v.jsonl", validation)
    paths = {"train": folder / "t.jsonl", "heldout": folder / "h.jsonl", "validation": folder / "v.jsonl"}
    return read_run_examples(make_recipe(data=paths, **sections))


def test_training_curve_measures_heldout_loss_on_the_validation_examples_if_there_are_any(tmp_path: Path) -> None:
    examples = read_validation(tmp_path, VALIDATION)
    assert examples.measured == tuple(VALIDATION)
    assert examples.heldout == tuple(HELDOUT)
    assert examples.measured_fingerprint != examples.heldout_fingerprint
    assert read(tmp_path, TRAIN, HELDOUT).measured == tuple(HELDOUT)


@pytest.mark.parametrize(
    ("stopping", "selected_by"),
    [
        ({}, SelectedBy.NONE),
        ({"every_steps": 5}, SelectedBy.NONE),
        ({"keep_best": True}, SelectedBy.VALIDATION),
        ({"patience": 2}, SelectedBy.VALIDATION),
    ],
)
def test_validation_set_is_recorded_as_used_for_model_selection_if_it_decides_early_stopping(
    tmp_path: Path, stopping: dict[str, Any], selected_by: SelectedBy
) -> None:
    assert read_validation(tmp_path, VALIDATION, stopping=stopping).selected_by is selected_by


def test_heldout_set_is_recorded_as_used_for_model_selection_if_there_is_no_validation_set(tmp_path: Path) -> None:
    write_examples(tmp_path / "t.jsonl", TRAIN)
    recipe = make_recipe(data={"train": tmp_path / "t.jsonl"}, stopping={"keep_best": True})
    assert read_run_examples(recipe).selected_by is SelectedBy.HELDOUT


@pytest.mark.parametrize(
    ("leak", "message"),
    [
        (TRAIN[0], "1 training examples have the same prompt as a validation example"),
        (HELDOUT[0], "1 validation examples have the same prompt as a held-out example"),
    ],
)
def test_validation_prompt_that_also_occurs_in_another_set_is_rejected(
    tmp_path: Path, leak: ChatExample, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_validation(tmp_path, [*VALIDATION, leak])


def test_validation_prompt_is_rejected_even_if_its_copy_in_the_training_file_is_held_out(
    tmp_path: Path,
) -> None:
    write_examples(tmp_path / "t.jsonl", TRAIN)
    paths = {"train": tmp_path / "t.jsonl"}
    held = read_run_examples(make_recipe(data=paths)).heldout
    write_examples(tmp_path / "v.jsonl", [*VALIDATION, *held])
    with pytest.raises(DataError, match=r"have the same prompt as a validation example") as caught:
        read_run_examples(make_recipe(data={**paths, "validation": tmp_path / "v.jsonl"}))
    assert f"svc data check {tmp_path}/t.jsonl --heldout {tmp_path}/v.jsonl" in (caught.value.todo or "")


def test_validation_examples_with_a_held_out_prompt_are_skipped_if_skipping_is_enabled(tmp_path: Path) -> None:
    write_examples(tmp_path / "t.jsonl", [*TRAIN, VALIDATION[0]])
    write_examples(tmp_path / "h.jsonl", HELDOUT)
    write_examples(tmp_path / "v.jsonl", [*VALIDATION, HELDOUT[0]])
    paths = {"train": tmp_path / "t.jsonl", "heldout": tmp_path / "h.jsonl", "validation": tmp_path / "v.jsonl"}
    bad_lines = BadLines(tmp_path / "bad")
    examples = read_run_examples(make_recipe(data=paths), bad_lines=bad_lines)
    assert (examples.train, examples.validation) == (tuple(TRAIN), tuple(VALIDATION))


def test_10_percent_of_the_examples_are_held_out_if_no_heldout_file_is_given(tmp_path: Path) -> None:
    examples = read_train(tmp_path, lines_of(400))
    assert abs(len(examples.heldout) - 40) < 24  # four standard deviations
    assert {*examples.train, *examples.heldout} == set(lines_of(400))


def test_heldout_examples_depend_only_on_the_seed(tmp_path: Path) -> None:
    first, again = (read_train(tmp_path, lines_of(40)).heldout for _ in range(2))
    assert first == again
    assert read_train(tmp_path, lines_of(40), seed=1).heldout != first


def split_again(folder: Path, learnt: PromptHashes) -> Examples:
    write_examples(folder / "t.jsonl", lines_of(60))
    return read_run_examples(make_recipe(data={"train": folder / "t.jsonl", "heldout_share": 0.3}), learnt=learnt)


def test_example_used_to_train_an_earlier_version_is_not_held_out(tmp_path: Path) -> None:
    before = split_again(tmp_path, NO_PROMPTS).heldout
    after = split_again(tmp_path, hash_prompts(before[:4]))
    assert after.heldout == before[4:]
    assert set(before[:4]) < set(after.train)


def test_output_says_how_many_examples_are_not_held_out_because_an_earlier_version_trained_on_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = split_again(tmp_path, NO_PROMPTS).heldout
    split_again(tmp_path, hash_prompts(before[:4]))
    output = " ".join(capsys.readouterr().err.split())
    assert (
        "4 examples are used for training instead of being held out: an earlier version of tiny was trained on them"
        in output
    )


def test_data_split_is_unchanged_after_the_recipe_has_produced_a_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = split_again(tmp_path, NO_PROMPTS)
    assert split_again(tmp_path, hash_prompts(first.train)) == first
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(("copies", "warned"), [(6, True), (1, False)])
def test_warning_is_printed_when_keeping_near_duplicates_together_enlarges_the_heldout_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], copies: int, warned: bool
) -> None:
    """There are six examples in each group, so 1 - 0.9 ** 6 = 47% of the groups are held out."""
    chance = random.Random(0)
    texts = [text(chance, 60, 60) for _ in range(240 // copies)]
    read_train(tmp_path, [make_example(f"{prompt} {number}", "yes") for prompt in texts for number in range(copies)])
    assert ("near duplicates stay together" in " ".join(capsys.readouterr().err.split())) is warned


def read_named(folder: Path, learnt: PromptHashes) -> Examples:
    write_examples(folder / "t.jsonl", TRAIN)
    write_examples(folder / "h.jsonl", lines_of(3, "held"))
    recipe = make_recipe(data={"train": folder / "t.jsonl", "heldout": folder / "h.jsonl"})
    return read_run_examples(recipe, learnt=learnt)


def test_heldout_file_is_used_unchanged_even_if_earlier_versions_trained_on_its_prompts(tmp_path: Path) -> None:
    assert read_named(tmp_path, hash_prompts(lines_of(2, "held"))).heldout == tuple(lines_of(3, "held"))


def test_number_of_heldout_prompts_used_to_train_earlier_versions_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_named(tmp_path, hash_prompts(lines_of(2, "held")))
    assert "an earlier version of tiny was trained on 2 of 3 held-out prompts" in " ".join(
        capsys.readouterr().err.split()
    )


def test_no_notice_is_printed_when_no_heldout_prompt_was_used_in_earlier_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_named(tmp_path, hash_prompts(TRAIN))
    assert capsys.readouterr().err == ""


def limited(folder: Path, limit: int | None, seed: int = 0) -> Sequence[ChatExample]:
    write_examples(folder / "t.jsonl", TRAIN)
    write_examples(folder / "h.jsonl", lines_of(40, "held"))
    data = {"train": folder / "t.jsonl", "heldout": folder / "h.jsonl", "seed": seed}
    return read_run_examples(make_recipe(data=data, evaluate={"limit": limit})).heldout


def test_heldout_examples_start_with_a_random_sample_when_evaluation_is_limited(tmp_path: Path) -> None:
    asked = limited(tmp_path, 8)[:8]
    assert not set(asked) <= set(lines_of(20, "held"))
    assert list(asked) == [example for example in lines_of(40, "held") if example in asked]


def test_heldout_sample_depends_on_the_data_seed(tmp_path: Path) -> None:
    assert limited(tmp_path, 8)[:8] != limited(tmp_path, 8, seed=1)[:8]


def test_heldout_examples_keep_file_order_without_an_evaluation_limit(tmp_path: Path) -> None:
    assert limited(tmp_path, None) == tuple(lines_of(40, "held"))


def test_all_task_examples_given_by_the_user_are_recorded_even_if_training_uses_fewer(tmp_path: Path) -> None:
    write_examples(tmp_path / "g.jsonl", lines_of(9, "general"))
    copies = [*TRAIN, *TRAIN[:2]]
    examples = read(tmp_path, copies, HELDOUT, limit=3, general=tmp_path / "g.jsonl", general_share=0.25)
    assert examples.given == (*copies, *HELDOUT)


def test_examples_split_off_as_heldout_still_count_as_user_supplied(tmp_path: Path) -> None:
    assert read_train(tmp_path, lines_of(40)).given == tuple(lines_of(40))


def test_data_sources_are_concatenated_in_recipe_order(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.jsonl", TRAIN[:3])
    write_examples(tmp_path / "b.jsonl", TRAIN[3:])
    write_examples(tmp_path / "h.jsonl", HELDOUT)
    paths = {"train": [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")], "heldout": tmp_path / "h.jsonl"}
    assert read_run_examples(make_recipe(data=paths)).train == (*TRAIN[3:], *TRAIN[:3])


def test_general_share_key_sets_the_proportion_of_general_training_examples(tmp_path: Path) -> None:
    write_examples(tmp_path / "g.jsonl", lines_of(20, "general"))
    examples = read(tmp_path, lines_of(15), HELDOUT, general=tmp_path / "g.jsonl", general_share=0.25)
    assert (len(examples.train), examples.general) == (20, 5)
    assert examples.train[:15] == tuple(lines_of(15))
    assert examples.train_fingerprint != read(tmp_path, lines_of(15), HELDOUT).train_fingerprint


def test_general_examples_that_are_also_held_out_are_not_used_for_training(tmp_path: Path) -> None:
    write_examples(tmp_path / "g.jsonl", [*HELDOUT, *lines_of(2, "general")])
    examples = read(tmp_path, TRAIN, HELDOUT, general=tmp_path / "g.jsonl", general_share=0.25)
    assert examples.heldout == tuple(HELDOUT)
    assert set(examples.train[-2:]) == set(lines_of(2, "general"))


def test_data_with_too_few_general_examples_is_rejected(tmp_path: Path) -> None:
    write_examples(tmp_path / "g.jsonl", lines_of(1, "general"))
    with pytest.raises(DataError, match=r"data\.general has only 1 examples"):
        read(tmp_path, TRAIN, HELDOUT, general=tmp_path / "g.jsonl", general_share=0.5)


def test_lines_skipped_as_invalid_or_leaked_are_stored_verbatim(tmp_path: Path) -> None:
    lines = [json.dumps(example.as_dict()).encode() for example in (*TRAIN, *HELDOUT)]
    bad = b'{"messages": [{"role": "user", "content": "caf\xe9"}]}\r\n'
    (tmp_path / "t.jsonl").write_bytes(lines[0] + b"\n" + bad + b"\n".join(lines[1:]))
    write_examples(tmp_path / "h.jsonl", HELDOUT)
    recipe = make_recipe(data={"train": tmp_path / "t.jsonl", "heldout": tmp_path / "h.jsonl"})
    bad_lines = BadLines(tmp_path / "bad")
    assert read_run_examples(recipe, bad_lines=bad_lines).train == tuple(TRAIN)
    assert bad_lines.count == 2
    assert (tmp_path / "bad" / "t.jsonl").read_bytes() == bad + lines[-1] + b"\n"
    entries = [json.loads(line) for line in (tmp_path / "bad" / "problems.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["code"]) for entry in entries] == [(2, "not_utf8"), (8, "leak")]


def test_truncated_file_is_rejected_even_if_invalid_lines_are_skipped(tmp_path: Path) -> None:
    lines = [json.dumps(example.as_dict()).encode() for example in TRAIN]
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines))[:-8])
    write_examples(tmp_path / "h.jsonl", HELDOUT)
    recipe = make_recipe(data={"train": tmp_path / "t.jsonl.gz", "heldout": tmp_path / "h.jsonl"})
    with pytest.raises(DataError, match=r"t\.jsonl\.gz.* cannot read the rest of the file") as caught:
        read_run_examples(recipe, bad_lines=BadLines(tmp_path / "bad"))
    assert "fetch or unpack the file again" in caught.value.todo


QUESTIONS = [make_example("what is red?", "a colour"), make_example("what is two?", "a number")]


def with_questions(folder: Path, train: list[ChatExample], **evaluate: Any) -> Examples:
    """Read the examples of a recipe that has a file of general questions."""
    for name, rows in {"t": train, "h": HELDOUT, "g": QUESTIONS}.items():
        write_examples(folder / f"{name}.jsonl", rows)
    paths = {"train": folder / "t.jsonl", "heldout": folder / "h.jsonl"}
    return read_run_examples(make_recipe(data=paths, evaluate={"general": folder / "g.jsonl"} | evaluate))


def test_training_example_matching_a_general_question_is_excluded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_on = make_example("What is  RED?", "some other answer")
    examples = with_questions(tmp_path, [*TRAIN, trained_on])
    assert examples.train == tuple(TRAIN)
    assert examples.train_fingerprint == with_questions(tmp_path, TRAIN).train_fingerprint
    assert "1 training examples are excluded" in capsys.readouterr().err


def test_general_examples_used_in_evaluation_are_excluded_from_training(tmp_path: Path) -> None:
    write_examples(tmp_path / "mixed.jsonl", [*QUESTIONS, make_example("what is three?", "a number")])
    for name, rows in {"t": TRAIN, "h": HELDOUT, "g": QUESTIONS}.items():
        write_examples(tmp_path / f"{name}.jsonl", rows)
    data = {"train": tmp_path / "t.jsonl", "heldout": tmp_path / "h.jsonl", "general": tmp_path / "mixed.jsonl"}
    recipe = make_recipe(data={**data, "general_share": 0.15}, evaluate={"general": tmp_path / "g.jsonl"})
    assert read_run_examples(recipe).train[-1].question == "what is three?"


def test_data_consisting_almost_entirely_of_general_questions_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only 1 of 3 training examples are not general questions") as raised:
        with_questions(tmp_path, [*QUESTIONS, TRAIN[0]])
    assert "evaluate.general" in raised.value.todo


@pytest.mark.parametrize(("limit", "asked"), [(1, 1), (None, 2)])
def test_general_limit_key_sets_the_number_of_general_questions(tmp_path: Path, limit: int | None, asked: int) -> None:
    questions = with_questions(tmp_path, TRAIN, general_limit=limit).questions
    assert questions is not None
    assert questions.examples == tuple(QUESTIONS[:asked])


def test_no_general_questions_are_evaluated_when_general_is_false(tmp_path: Path) -> None:
    assert with_questions(tmp_path, [*TRAIN, QUESTIONS[0]], general=False).questions is None


def test_built_in_general_questions_are_evaluated_by_default(tmp_path: Path) -> None:
    questions = read(tmp_path, TRAIN, HELDOUT).questions
    assert questions is not None
    assert questions.name == "general.jsonl"


def pairs_of(count: int, prompt: str = "question") -> list[PreferencePair]:
    """Return pairs with the prompts of `lines_of`, whose better answer is yes."""
    return [
        PreferencePair(example, make_example(f"{prompt} {place}", "no"))
        for place, example in enumerate(lines_of(count, prompt))
    ]


def read_judged(folder: Path, objective: str, **sections: Any) -> Examples:
    write_pairs(folder / "t.jsonl", pairs_of(40))
    data = {"train": folder / "t.jsonl"} | sections.pop("data", {})
    return read_run_examples(make_recipe(objective=objective, data=data, **sections))


def test_preference_pairs_are_split_into_training_and_heldout_by_their_chosen_answers(tmp_path: Path) -> None:
    examples = read_judged(tmp_path, "dpo")
    assert [pair.chosen for pair in examples.preferences if isinstance(pair, PreferencePair)] == list(examples.train)
    assert [pair.chosen for pair in examples.pairs] == list(examples.heldout)
    assert len(examples.preferences) + len(examples.pairs) == 40
    assert {example.answer for example in examples.given} == {"yes"}


def test_answers_labeled_desirable_are_used_as_reference_answers(tmp_path: Path) -> None:
    examples = read_judged(tmp_path, "kto")
    assert {example.answer for example in examples.heldout} == {"yes"}
    assert {example.answer for example in examples.train} == {"yes", "no"}
    assert len(examples.heldout_preferences) == 2 * len(examples.heldout)
    assert [pair.chosen for pair in examples.pairs] == list(examples.heldout)
    assert {pair.rejected.answer for pair in examples.pairs} == {"no"}


def test_evaluated_pairs_are_in_the_same_order_as_the_sampled_heldout_examples(tmp_path: Path) -> None:
    examples = read_judged(tmp_path, "dpo", evaluate={"limit": 2}, data={"heldout_share": 0.3})
    assert [pair.chosen for pair in examples.pairs] == list(examples.heldout)
    assert examples.heldout != read_judged(tmp_path, "dpo", data={"heldout_share": 0.3}).heldout


def test_training_fingerprint_depends_on_the_rejected_answers(tmp_path: Path) -> None:
    first = read_judged(tmp_path, "dpo")
    changed = [replace(pair, rejected=make_example(pair.chosen.question, "never")) for pair in pairs_of(40)]
    write_pairs(tmp_path / "t.jsonl", changed)
    second = read_run_examples(make_recipe(objective="dpo", data={"train": tmp_path / "t.jsonl"}))
    assert second.train == first.train
    assert second.train_fingerprint != first.train_fingerprint


def test_heldout_set_with_only_undesirable_answers_is_rejected(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t.jsonl", pairs_of(40))
    row = {"prompt": "another", "completion": "no", "label": False}
    (tmp_path / "h.jsonl").write_text(json.dumps(row), "utf-8")
    data = {"train": tmp_path / "t.jsonl", "heldout": tmp_path / "h.jsonl"}
    with pytest.raises(DataError, match="no held-out answer is labeled desirable"):
        read_run_examples(make_recipe(objective="kto", data=data))


def test_training_pair_with_a_heldout_prompt_counts_as_a_leak(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t.jsonl", pairs_of(10))
    write_pairs(tmp_path / "h.jsonl", pairs_of(1))
    data = {"train": tmp_path / "t.jsonl", "heldout": tmp_path / "h.jsonl"}
    with pytest.raises(DataError, match="1 training examples have the same prompt"):
        read_run_examples(make_recipe(objective="dpo", data=data))
