"""Redirects the terminal output of libraries to the log.

gptqmodel prints a banner and tables to stdout, which is reserved for results, and PEFT imports gptqmodel
for every model that it wraps.
"""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

_log = logging.getLogger(__name__)


class _LogLines(io.TextIOBase):
    """A text stream whose lines are logged at DEBUG level."""

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
    """Redirect stdout to this module's logger within the `with` block. Progress displays print to stderr and
    are not affected.

    The root logger is restored afterwards. gptqmodel imports tokenicer, which makes the root logger print
    the logs of every library. Enter this context after starting a progress display, because rich replaces
    stdout when it starts.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        with redirect_stdout(_LogLines()):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
