"""The examples of a run: which are trained on, which are held out, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.errors import DataError
from tests.trainer.conftest import make_example, make_recipe
from trainer.pipeline.examples import Examples, read_run_examples


def read(folder: Path, train: list[ChatExample], heldout: list[ChatExample], **data: Any) -> Examples:
    write_examples(folder / "t.jsonl", train)
    write_examples(folder / "h.jsonl", heldout)
    paths = {"train": folder / "t.jsonl", "heldout": folder / "h.jsonl"}
    return read_run_examples(make_recipe(data={**paths, **data}))


TRAIN = [make_example(f"question {number}", "yes") for number in range(6)]
HELDOUT = [make_example("another", "no")]


def test_examples_are_read_with_their_fingerprints(tmp_path: Path) -> None:
    examples = read(tmp_path, TRAIN, HELDOUT)
    assert examples.train == tuple(TRAIN)
    assert examples.heldout == tuple(HELDOUT)
    assert examples.train_fingerprint != examples.heldout_fingerprint


def test_skip_and_limit_choose_a_part(tmp_path: Path) -> None:
    assert read(tmp_path, TRAIN, HELDOUT, skip=1, limit=3).train == tuple(TRAIN[1:4])


def test_a_part_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    whole, part = read(tmp_path, TRAIN, HELDOUT), read(tmp_path, TRAIN, HELDOUT, limit=3)
    assert whole.train_fingerprint != part.train_fingerprint


def test_skipping_all_but_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves 1 of 6 examples"):
        read(tmp_path, TRAIN, HELDOUT, skip=5)


def test_a_single_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl holds 1 example"):
        read(tmp_path, TRAIN[:1], HELDOUT)


def test_an_empty_heldout_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"h\.jsonl holds 0 examples"):
        read(tmp_path, TRAIN, [])


def test_training_on_the_heldout_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 training examples have the prompt of a held-out one, the first is number 3"):
        read(tmp_path, TRAIN, [make_example("Question  2", "no")])


def lines_of(count: int, what: str = "question") -> list[ChatExample]:
    return [make_example(f"{what} {number}", "yes") for number in range(count)]


def read_train(folder: Path, examples: list[ChatExample], **data: Any) -> Examples:
    write_examples(folder / "t.jsonl", examples)
    return read_run_examples(make_recipe(data={"train": folder / "t.jsonl", **data}))


def test_without_a_heldout_set_a_tenth_is_held_out(tmp_path: Path) -> None:
    examples = read_train(tmp_path, lines_of(40))
    assert (len(examples.train), len(examples.heldout)) == (36, 4)
    assert {*examples.train, *examples.heldout} == set(lines_of(40))


def test_the_seed_decides_what_is_held_out(tmp_path: Path) -> None:
    first, again = (read_train(tmp_path, lines_of(40)).heldout for _ in range(2))
    assert first == again
    assert read_train(tmp_path, lines_of(40), seed=1).heldout != first


def test_sources_are_joined_in_their_order(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.jsonl", TRAIN[:3])
    write_examples(tmp_path / "b.jsonl", TRAIN[3:])
    write_examples(tmp_path / "h.jsonl", HELDOUT)
    paths = {"train": [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")], "heldout": tmp_path / "h.jsonl"}
    assert read_run_examples(make_recipe(data=paths)).train == (*TRAIN[3:], *TRAIN[:3])


def test_general_examples_are_their_share_of_the_training_examples(tmp_path: Path) -> None:
    write_examples(tmp_path / "g.jsonl", lines_of(20, "general"))
    examples = read(tmp_path, lines_of(15), HELDOUT, general=tmp_path / "g.jsonl", general_share=0.25)
    assert (len(examples.train), examples.general) == (20, 5)
    assert examples.train[:15] == tuple(lines_of(15))
    assert examples.train_fingerprint != read(tmp_path, lines_of(15), HELDOUT).train_fingerprint


def test_general_examples_are_never_held_out(tmp_path: Path) -> None:
    write_examples(tmp_path / "g.jsonl", [*HELDOUT, *lines_of(2, "general")])
    examples = read(tmp_path, TRAIN, HELDOUT, general=tmp_path / "g.jsonl", general_share=0.25)
    assert examples.heldout == tuple(HELDOUT)
    assert set(examples.train[-2:]) == set(lines_of(2, "general"))


def test_too_few_general_examples_are_refused(tmp_path: Path) -> None:
    write_examples(tmp_path / "g.jsonl", lines_of(1, "general"))
    with pytest.raises(DataError, match=r"data\.general holds 1 examples"):
        read(tmp_path, TRAIN, HELDOUT, general=tmp_path / "g.jsonl", general_share=0.5)


def test_bad_lines_and_leaks_are_left_out_and_kept_as_they_stood(tmp_path: Path) -> None:
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


def test_a_file_that_is_cut_off_stops_a_run_that_leaves_bad_lines_out(tmp_path: Path) -> None:
    lines = [json.dumps(example.as_dict()).encode() for example in TRAIN]
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines))[:-8])
    write_examples(tmp_path / "h.jsonl", HELDOUT)
    recipe = make_recipe(data={"train": tmp_path / "t.jsonl.gz", "heldout": tmp_path / "h.jsonl"})
    with pytest.raises(DataError, match=r"t\.jsonl\.gz.* cannot be read on") as caught:
        read_run_examples(recipe, bad_lines=BadLines(tmp_path / "bad"))
    assert "fetch or unpack the file again" in caught.value.todo
