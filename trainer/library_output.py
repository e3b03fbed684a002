"""Redirects the output of libraries from the terminal to the log.

gptqmodel prints a banner and tables to stdout, which is reserved for results, and PEFT imports it for
every model that it wraps.
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
    """Redirect stdout to this module's logger during the `with` block. Progress is printed to stderr and is not
    affected.

    The root logger is restored afterwards, because tokenicer, which gptqmodel imports, makes it print the
    logs of every library. Enter this context after starting a progress display, because rich replaces stdout
    when it starts.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        with redirect_stdout(_LogLines()):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
