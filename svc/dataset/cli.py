"""`svc data check` reports problems in examples before they are trained on."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from svc.invocation import json_option, settings_of

if TYPE_CHECKING:
    from svc.dataset.checks.check import DataReport

_MAX_SHOWN = 50  # problems; --json has all
_MAX_LABELS_SHOWN = 20


@click.group()
def data() -> None:
    """Check files of chat examples and preferences."""


@data.command()
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--heldout", metavar="FILE", help="File of held-out examples; FILES must not contain any of these examples."
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Folder of the base model; its tokenizer counts tokens and defines the special tokens to look for.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=16),
    default=4096,
    show_default=True,
    help="Maximum number of tokens per example. Without --base, token counts are estimated.",
)
@json_option
@click.pass_context
def check(
    ctx: click.Context, files: tuple[str, ...], heldout: str | None, base: Path | None, max_length: int, as_json: bool
) -> None:
    """Report problems by line number. The exit code is 1 if any line cannot be trained on.

    FILES are files, folders or hub datasets (hf:ORG/NAME) that you will use in the same training run.
    """
    from svc.dataset.checks.base_tokenizer import BaseTokenizer
    from svc.dataset.checks.check import check_files
    from svc.dataset.readers.source import data_files
    from svc.sample_size import say_detectable
    from svc.terminal import reading, waiting

    cache = settings_of(ctx).base_cache
    paths = [path for source in files for path in data_files(source, cache)]
    kept_back = data_files(heldout, cache) if heldout else []
    tokenizer = None
    if base:
        with waiting("Loading the tokenizer"):
            tokenizer = BaseTokenizer(base)
    total = sum(path.stat().st_size for path in (*paths, *kept_back) if path.is_file())
    with reading("Checking", total) as on_read:
        reports = check_files(paths, kept_back, max_length=max_length, base=tokenizer, on_read=on_read)
    if as_json:
        _print_json(reports)
    else:
        for report in reports:
            _show(report)
        held = sum(report.examples for report in reports[len(paths) :])
        if held:
            click.echo(say_detectable(held))
    sys.exit(1 if any(report.problems.errors for report in reports) else 0)


def _print_json(reports: "list[DataReport]") -> None:
    """Print the reports as a JSON list, with one problem per line because there may be millions."""
    write = sys.stdout.write
    for place, report in enumerate(reports):
        head = json.dumps(_machine(report), indent=1, ensure_ascii=False)
        write(("[" if place == 0 else ",") + head.removesuffix("\n}") + ',\n "problems": [')
        for number, problem in enumerate(report.problems):
            write(("," if number else "") + "\n  " + json.dumps(asdict(problem), ensure_ascii=False))
        write("\n ]\n}")
    write("]\n")


def _machine(report: "DataReport") -> dict[str, object]:
    return {
        "file": report.file,
        "kind": report.kind.name.lower(),
        "lines": report.lines,
        "examples": report.examples,
        "errors": report.problems.errors,
        "warnings": len(report.problems) - report.problems.errors,
        "codes": dict(sorted(report.problems.codes.items())),
        "median_characters": report.median_characters,
        "longest_characters": max(report.lengths, default=0),
        "median_tokens": report.median_tokens or None,
        "longest_tokens": max(report.tokens, default=None),
        "labels": report.labels,
        "desirable": report.desirable[True] if report.desirable else None,
        "undesirable": report.desirable[False] if report.desirable else None,
        "length_bias": asdict(bias) if (bias := report.length_bias) else None,
    }


def _show(report: "DataReport") -> None:
    from itertools import islice

    from svc.dataset.problem.problem import TODO, Severity, printable
    from svc.dataset.readers.reader import Kind

    problems = report.problems
    noun = report.kind if report.kind is not Kind.CHAT else "documents" if report.documents else "examples"
    click.echo(f"{report.file}: {report.examples} {noun} in {report.lines} lines")
    if report.lengths:
        click.echo(f"  length: median {report.median_characters} characters, longest {max(report.lengths)}")
    if report.tokens:
        click.echo(f"  tokens: median {report.median_tokens}, longest {max(report.tokens)}")
    if report.labels:
        balance = ", ".join(f"{answer} {count}" for answer, count in list(report.labels.items())[:_MAX_LABELS_SHOWN])
        click.echo(f"  answers: {printable(balance)}")
    if report.desirable:
        click.echo(f"  labels: {report.desirable[True]} desirable, {report.desirable[False]} undesirable")
    if bias := report.length_bias:
        click.echo(f"  length bias: {bias}")
    click.echo(f"  problems: {problems.errors} errors, {len(problems) - problems.errors} warnings")
    for problem in islice(problems, _MAX_SHOWN):
        color = "red" if problem.severity is Severity.ERROR else "yellow"
        click.secho(f"  line {problem.line}: {problem.severity}: {problem.message} [{problem.code}]", fg=color)
    if len(problems) > _MAX_SHOWN:
        click.echo(f"  … and {len(problems) - _MAX_SHOWN} more; --json shows all")
    if problems.codes:
        click.echo("  what to do:")
    for code, count in problems.codes.most_common():
        click.echo(f"    {code} ({count}): {TODO[code]}")
