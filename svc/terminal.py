"""Output for people and machines: text and progress on a terminal, JSON with `--json`. Results go to stdout, all else
to stderr, so that a pipe gets results only."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

Progressed = TypeVar("Progressed")

console = Console(stderr=True, highlight=False)
output = Console(highlight=False)
if not output.is_terminal:
    output.width = 120  # in a pipe or a log, a table is not broken at 80 columns
_PLAIN_LINE_S = 15.0  # without a terminal, a long step prints one line per interval


def quiet_libraries() -> None:
    """Limit libraries to warnings, without progress bars; call it before they are imported.

    Some enable logging for the whole process, HTTP clients log each request, and their progress bars disturb ours.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    for library in ("httpx", "httpcore", "alembic", "uvicorn.error", "tokenicer", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # These warn at import about optional kernels that are not installed and not used here.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def print_json(value: Any) -> None:
    """Write one JSON value to stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def print_table(headers: Sequence[str | Column], rows: Iterable[Sequence[object]], *, to: Console = output) -> None:
    """Print a table of plain text; None is an empty cell."""
    table = Table(*headers, box=None)
    for row in rows:
        table.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    to.print(table)


@contextmanager
def heartbeat(line: Callable[[], str]) -> Iterator[None]:
    """Print a line every 15 s while the body runs, for readers of a log; nothing on a terminal.

    The lines come from a separate thread, because a step may take minutes without any output.

    Args:
        line: returns the text of the next line.
    """
    if console.is_terminal:
        yield
        return
    ended = threading.Event()

    def print_lines() -> None:
        while not ended.wait(_PLAIN_LINE_S):
            console.print(f"  {line()}", markup=False, soft_wrap=True)

    thread = threading.Thread(target=print_lines, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _heartbeat_of(first: Progressed, line: Callable[[Progressed], str]) -> Iterator[Callable[[Progressed], None]]:
    """Print the progress every 15 s; yield a callback that updates it.

    Args:
        first: initial progress.
        line: returns the text for a progress value; the elapsed seconds are appended.
    """
    started, newest = time.monotonic(), first

    def show(state: Progressed) -> None:
        nonlocal newest
        newest = state

    with heartbeat(lambda: f"{line(newest)} after {time.monotonic() - started:.0f} s"):
        yield show


@contextmanager
def counting(text: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar over a known number of steps; yield a callback that advances it by one."""
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)
        return
    started, done = time.monotonic(), 0
    with _heartbeat_of(0, lambda number: f"{text}: {number}/{total}") as show:

        def advance() -> None:
            nonlocal done
            done += 1
            show(done)

        yield advance
    console.print(f"  {text}: {done}/{total} in {time.monotonic() - started:.0f} s")


@contextmanager
def reading(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for bytes within the body; yield a callback that takes the number of bytes read so far."""
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task(text, total=total)
            yield lambda position: progress.update(task, completed=position)
        return
    with _heartbeat_of(0, lambda read: f"{text}: {read / 1e6:.0f} of {total / 1e6:.0f} MB") as show:
        yield show


@contextmanager
def advancing(text: str, phases: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Show a progress bar over named phases of different lengths, with the time; yield a callback that starts a phase.

    Args:
        phases: names of the phases, in order; the bar shows how many are complete.
    """
    started = time.monotonic()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(text, total=len(phases))

            def show(phase: str) -> None:
                progress.update(task, completed=phases.index(phase), description=f"{text}: {phase}", refresh=True)

            yield show
            progress.update(task, completed=len(phases), description=text)
        return
    console.print(f"  {text} …")
    with _heartbeat_of(phases[0], lambda now: f"{text}: {now}, {phases.index(now)}/{len(phases)}") as begin:
        yield begin
    console.print(f"  {text}: {time.monotonic() - started:.0f} s")


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a spinner with the time, for a step of unknown length."""
    started = time.monotonic()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            progress.add_task(text)
            yield
        return
    console.print(f"  {text} …")
    with heartbeat(lambda: f"{text}: {time.monotonic() - started:.0f} s so far"):
        yield
    console.print(f"  {text}: {time.monotonic() - started:.0f} s")
