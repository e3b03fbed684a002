"""A job's error has the message of its training, without paths of the machine."""

import pytest

from serving.fine_tuning.request_rows import JobError
from serving.fine_tuning.training_error import read_error, without_paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/root/home/files/file-9:4: no answer", "file-9:4: no answer"),
        ("cannot read '/a/b c' now", "cannot read 'b c' now"),
        ("10 tokens/s and n/a", "10 tokens/s and n/a"),
        ("no path", "no path"),
    ],
)
def test_paths_in_error_messages_are_shortened_to_their_last_component(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_last_error_in_the_output_becomes_the_job_error() -> None:
    log = "error: first\n  do: a\nwarming up\n\x1b[31merror: the loss is nan at step 3\x1b[0m\n  do: lower the rate\n"
    assert read_error(12, log) == JobError("training_failed", "the loss is nan at step 3")


def test_unknown_exit_code_of_a_training_run_is_reported_as_a_server_error() -> None:
    assert read_error(9, "error: damaged").code == "server_error"
