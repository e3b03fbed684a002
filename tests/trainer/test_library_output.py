"""Tests that output and logs of libraries do not reach the terminal."""

import logging

import pytest

from trainer.library_output import library_output_to_log


def test_library_output_is_logged_instead_of_printed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "trainer.library_output"), library_output_to_log():
        print("a banner")
    assert (capsys.readouterr().out, caplog.messages) == ("", ["a banner"])


def test_root_logger_is_restored_after_a_library_configures_it() -> None:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    with library_output_to_log():
        logging.basicConfig(level=logging.INFO, force=True)
    assert (root.level, root.handlers) == before
