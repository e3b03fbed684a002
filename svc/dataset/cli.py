"""`svc data check`: what is wrong with the examples, before anything is trained."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from svc.dataset.check import DataReport, Severity, check_file
from svc.invocation import json_option

_SHOWN = 50  # problems a person reads; --json has all


@click.group()
def data() -> None:
    """Check files of chat examples."""


@data.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--heldout", type=click.Path(path_type=Path), help="Examples that must not stand in FILES.")
@json_option
def check(files: tuple[Path, ...], heldout: Path | None, as_json: bool) -> None:
    """Report problems by line number; exit code 1 when a line cannot be trained on."""
    reports = [check_file(path, heldout) for path in files]
    if as_json:
        from svc.terminal import print_json

        print_json([_machine(report) for report in reports])
    else:
        for report in reports:
            _show(report)
    sys.exit(1 if any(report.errors for report in reports) else 0)


def _machine(report: DataReport) -> dict[str, object]:
    return {
        "file": report.file,
        "lines": report.lines,
        "examples": report.examples,
        "errors": report.errors,
        "median_characters": report.median_characters,
        "longest_characters": max(report.lengths, default=0),
        "labels": report.labels,
        "problems": [asdict(problem) for problem in report.problems],
    }


def _show(report: DataReport) -> None:
    warnings = len(report.problems) - report.errors
    click.echo(f"{report.file}: {report.examples} examples in {report.lines} lines")
    if report.lengths:
        longest = max(report.lengths)
        click.echo(f"  length: median {report.median_characters} characters, longest {longest}")
    if report.labels:
        balance = ", ".join(f"{answer} {count}" for answer, count in list(report.labels.items())[:20])
        click.echo(f"  answers: {balance}")
    click.echo(f"  problems: {report.errors} errors, {warnings} warnings")
    for problem in report.problems[:_SHOWN]:
        colour = "red" if problem.severity is Severity.ERROR else "yellow"
        click.secho(f"  line {problem.line}: {problem.severity}: {problem.message}", fg=colour)
    if len(report.problems) > _SHOWN:
        click.echo(f"  … and {len(report.problems) - _SHOWN} more; --json shows all")
