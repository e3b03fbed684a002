"""What people and machines see: text and progress on a terminal, JSON with `--json`. Results go to stdout, all else
to stderr, so that a pipe gets results only."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
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

console = Console(stderr=True, highlight=False)
output = Console(highlight=False)
if not output.is_terminal:
    output.width = 120  # in a pipe or a log, a table is not broken at 80 columns
_PLAIN_LINE_S = 20.0  # without a terminal, progress is a line now and then


def quiet_libraries() -> None:
    """Lets libraries log warnings only: some switch on logging for the whole process, HTTP clients log each request."""
    for library in ("httpx", "httpcore", "alembic", "uvicorn.error", "tokenicer"):
        logging.getLogger(library).setLevel(logging.WARNING)


def print_json(value: Any) -> None:
    """Writes one JSON value to stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


@contextmanager
def counting(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar over a known number of steps; yields what advances it by one."""
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)
        return
    started = told = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, told
        done += 1
        if time.monotonic() - told >= _PLAIN_LINE_S:
            told = time.monotonic()
            console.print(f"  {text}: {done}/{total}")

    yield advance
    console.print(f"  {text}: {done}/{total} in {time.monotonic() - started:.0f} s")


@contextmanager
def reading(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes; yields what says how many were read so far. Gone when done: the result says it all."""
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
    started = told = time.monotonic()

    def show(position: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _PLAIN_LINE_S:
            told = time.monotonic()
            share = f"{position / 1e6:.0f} of {total / 1e6:.0f} MB"
            console.print(f"  {text}: {share} after {told - started:.0f} s")

    yield show


@contextmanager
def advancing(text: str, phases: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """A progress bar over named phases of unlike length, with the time; yields what says which one has begun.

    Args:
        phases: in their order; the bar shows how many have ended. What begins after the body has ended is not shown.
    """
    started = told = time.monotonic()
    ended = False
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

    def begin(phase: str) -> None:
        nonlocal told
        if not ended and time.monotonic() - told >= _PLAIN_LINE_S:
            told = time.monotonic()
            console.print(f"  {text}: {phase}, {phases.index(phase)}/{len(phases)} after {told - started:.0f} s")

    yield begin
    ended = True
    console.print(f"  {text}: {time.monotonic() - started:.0f} s")


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner with the time, for a step of unknown length."""
    started = time.monotonic()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            progress.add_task(text)
            yield
        return
    console.print(f"  {text} …")
    yield
    console.print(f"  {text}: {time.monotonic() - started:.0f} s")
