"""What libraries print or log by themselves stays away from the terminal."""

import logging

import pytest

from trainer.library_output import library_output_to_log


def test_what_a_library_prints_is_logged(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "trainer.library_output"), library_output_to_log():
        print("a banner")
    assert (capsys.readouterr().out, caplog.messages) == ("", ["a banner"])


def test_a_library_that_configures_the_root_logger_does_so_for_itself_alone() -> None:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    with library_output_to_log():
        logging.basicConfig(level=logging.INFO, force=True)
    assert (root.level, root.handlers) == before
