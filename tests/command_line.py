"""Runs `svc` in the current process through its real entry point, so that tests see what a user would."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from svc import cli


class Ended(NamedTuple):
    """Outcome of a `svc` invocation."""

    code: int
    out: str
    err: str


class Svc:
    """The `svc` command, run in the current process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["svc", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = self._capsys.readouterr()
        return Ended(int(caught.value.code or 0), captured.out, captured.err)
