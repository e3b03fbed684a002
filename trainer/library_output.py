"""Keeps what libraries print away from the terminal: it goes to the log, where it can be looked up.

gptqmodel prints a banner and tables to stdout, and PEFT imports it for every model it wraps. Stdout is for results.
"""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

_log = logging.getLogger(__name__)


class _LogLines(io.TextIOBase):
    """A text stream whose lines are logged at DEBUG."""

    def __init__(self) -> None:
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text.replace("\r", "\n")).split("\n")
        for line in lines:
            if line.strip():
                _log.debug("%s", line.rstrip())
        return len(text)


@contextmanager
def library_output_to_log() -> Iterator[None]:
    """Inside, stdout is this module's logger; progress, which goes to stderr, is not touched.

    The root logger is afterwards as it was: tokenicer, which gptqmodel imports, has it print what every library logs.
    Enter it after a progress display: rich puts its own stdout in place when it starts.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        with redirect_stdout(_LogLines()):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
