"""Tests that `svc feedback` writes feedback as training data that the readers accept."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine as Store

from svc.dataset.readers.preferences import read_labeled, read_pairs
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.errors import NotFoundError
from svc.store.feedback import Feedback, Rating, keep_feedback
from svc.store.requests import RequestOutcome, add_requests
from svc.version import VersionId
from tests.builders.requests import LONG_AGO, RECORD
from tests.command_line import Svc
from tests.svc.chats import chat, turn

ASKED = [turn("user", "Name a red fruit.")]
GIVEN, CORRECTED = chat("Name a red fruit.", "A banana."), chat("Name a red fruit.", "A cherry.")
CORRECTION = Feedback(Rating.BAD, correction="A cherry.")


def rate(store: Store, feedback: Feedback, id: str = "req-1", prompt: Any = ASKED, **fields: Any) -> None:
    text = None if prompt is None else json.dumps(prompt)
    record = RECORD._replace(**{"request_id": id, "prompt": text, "answer": "A banana.", **fields})
    add_requests(store, [record])
    assert keep_feedback(store, id, feedback)


def written(svc: Svc, folder: Path, *arguments: str) -> Path:
    path = folder / "out.jsonl"
    assert svc("feedback", *arguments, "--output", path).code == 0
    return path


def test_correction_and_original_answer_form_a_preference_pair(svc: Svc, store: Store, tmp_path: Path) -> None:
    rate(store, CORRECTION)
    assert read_pairs(written(svc, tmp_path, "tiny")) == [PreferencePair(CORRECTED, GIVEN)]


def test_correction_becomes_the_answer_of_a_chat_example_when_the_objective_is_sft(
    svc: Svc, store: Store, tmp_path: Path
) -> None:
    rate(store, CORRECTION)
    assert read_examples(written(svc, tmp_path, "tiny", "--objective", "sft")) == [CORRECTED]


def test_ratings_become_labels_when_the_objective_is_kto(svc: Svc, store: Store, tmp_path: Path) -> None:
    rate(store, CORRECTION, "req-1")
    rate(store, Feedback(Rating.GOOD), "req-2")
    rate(store, Feedback(Rating.BAD), "req-3")
    assert read_labeled(written(svc, tmp_path, "tiny", "--objective", "kto")) == [
        LabeledAnswer(GIVEN, desirable=False),
        LabeledAnswer(CORRECTED, desirable=True),
        LabeledAnswer(GIVEN, desirable=True),
        LabeledAnswer(GIVEN, desirable=False),
    ]


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "red fruit."}]}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Name a red fruit."}]}],
    ],
)
def test_text_parts_of_a_rated_prompt_are_joined(svc: Svc, store: Store, tmp_path: Path, prompt: Any) -> None:
    rate(store, CORRECTION, prompt=prompt)
    assert read_pairs(written(svc, tmp_path, "tiny")) == [PreferencePair(CORRECTED, GIVEN)]


def test_developer_turn_becomes_a_system_turn(svc: Svc, store: Store, tmp_path: Path) -> None:
    rate(store, CORRECTION, prompt=[turn("developer", "Be short."), *ASKED])
    (pair,) = read_pairs(written(svc, tmp_path, "tiny"))
    assert [message.role for message in pair.chosen.prompt] == ["system", "user"]


def test_thinking_is_removed_from_the_original_answer_of_rated_requests(svc: Svc, store: Store, tmp_path: Path) -> None:
    rate(store, CORRECTION, answer="Red? Yellow.</think>\n\nA banana.")
    assert read_pairs(written(svc, tmp_path, "tiny")) == [PreferencePair(CORRECTED, GIVEN)]


CALL = '{"name": "rain", "arguments": {}}'


@pytest.mark.parametrize(
    ("fields", "feedback", "reason"),
    [
        ({"prompt": None, "answer": None}, CORRECTION, "the prompt and the answer are not stored"),
        ({"prompt": "Name a red"}, CORRECTION, "tools, or other content than text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, CORRECTION, "other content than text"),
        ({"prompt": [*ASKED, {"type": "function_call", "name": "rain"}]}, CORRECTION, "other content than text"),
        ({"prompt": [*ASKED, turn("tool", "wet")]}, CORRECTION, "other content than text"),
        ({"answer": CALL}, CORRECTION, "tools, or other content than text"),
        ({}, Feedback(Rating.BAD), "there is no correction, or it equals"),
        ({}, Feedback(Rating.BAD, correction=" "), "there is no correction, or it equals"),
        ({}, Feedback(Rating.GOOD, correction="A banana.\n"), "there is no correction, or it equals"),
    ],
)
def test_feedback_that_yields_no_preference_pair_is_counted_as_unused(
    svc: Svc, store: Store, tmp_path: Path, fields: dict[str, Any], feedback: Feedback, reason: str
) -> None:
    rate(store, feedback, "other", **fields)
    rate(store, CORRECTION, "req-2")
    ended = svc("feedback", "tiny")
    assert [json.loads(line)["request_id"] for line in ended.out.splitlines()] == ["req-2"]
    assert "rated answers not used: 1; " in ended.err
    assert reason in " ".join(ended.err.split())
    assert ended.code == 0


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["tiny"], ["old", "new"]),
        (["tiny@3"], ["new"]),
        (["tiny", "--since", "2020-01-01"], ["new"]),
    ],
)
def test_feedback_can_be_selected_by_version_and_time(
    svc: Svc, store: Store, arguments: list[str], ids: list[str]
) -> None:
    rate(store, CORRECTION, "old", started_at=LONG_AGO)
    rate(store, CORRECTION, "new", version=VersionId("tiny", 3))
    rate(store, CORRECTION, "other", model="large")
    rate(store, CORRECTION, "broken", outcome=RequestOutcome.CLIENT_GONE)
    assert [json.loads(line)["request_id"] for line in svc("feedback", *arguments).out.splitlines()] == ids


def test_feedback_file_is_readable_only_by_its_owner(svc: Svc, store: Store, tmp_path: Path) -> None:
    rate(store, CORRECTION)
    assert written(svc, tmp_path, "tiny").stat().st_mode & 0o777 == 0o600


def test_error_names_the_output_file_when_it_cannot_be_written(svc: Svc, store: Store, tmp_path: Path) -> None:
    rate(store, CORRECTION)
    ended = svc("feedback", "tiny", "--output", tmp_path / "missing" / "out.jsonl")
    assert ended.code == 2
    assert "out.jsonl: No such file" in ended.err


def test_existing_output_file_is_kept_when_there_is_no_feedback_to_write(
    svc: Svc, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl").write_text("old")
    assert svc("feedback", "tiny", "--output", tmp_path / "out.jsonl").code == NotFoundError.exit_code
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_error_names_the_content_logging_setting_when_no_feedback_can_be_used(svc: Svc, store: Store) -> None:
    ended = svc("feedback", "tiny")
    assert ended.code == NotFoundError.exit_code
    assert "no feedback on tiny can be used for the objective dpo" in ended.err
    assert "request_log.content_share" in ended.err
