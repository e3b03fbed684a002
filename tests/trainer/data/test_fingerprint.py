"""Tests that equal examples have equal fingerprints and different examples do not."""

import json
from pathlib import Path

from svc.dataset.readers.reader import read_examples
from tests.svc.chats import chat
from trainer.data.fingerprint import fingerprint


def test_dataset_fingerprint_ignores_json_formatting_and_key_order_and_extra_keys(tmp_path: Path) -> None:
    value = chat().as_dict()
    swapped = [{"content": turn["content"], "role": turn["role"]} for turn in value["messages"]]
    (tmp_path / "a.jsonl").write_text(json.dumps(value))
    (tmp_path / "b.jsonl").write_text("\n" + json.dumps({"id": 1, "messages": swapped}, separators=(" , ", " : ")))
    one, other = (fingerprint(read_examples(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert one == other


def test_dataset_fingerprint_changes_with_content() -> None:
    assert fingerprint([chat("a")]) != fingerprint([chat("b")])


def test_dataset_fingerprint_changes_with_example_order() -> None:
    assert fingerprint([chat("a"), chat("b")]) != fingerprint([chat("b"), chat("a")])


def test_dataset_fingerprint_changes_with_example_boundaries() -> None:
    assert fingerprint([chat("a"), chat("a")]) != fingerprint([chat("a")])
