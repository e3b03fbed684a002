"""A version on one screen: what it is made of, how good it is, how large and how fast in each format."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from svc.evaluation.evaluator import EvaluationReport
from svc.registry.manifest import FormatRecord, Manifest
from svc.registry.parity import ParityReport
from svc.terminal import output


def print_version(manifest: Manifest, folder: Path) -> None:
    """Prints it to stdout."""
    base, data = manifest.base, manifest.data
    output.print(f"[bold]{manifest.id}[/bold]  {folder}")
    output.print(
        f"base {base.origin} (licence: {base.licence or 'unknown'}), trained on {data.train_examples} examples"
    )
    output.print(f"judged by {manifest.judged_examples} of {data.heldout_examples} held-out examples\n")
    output.print(evaluation_table(manifest))
    for failure in manifest.failed:
        output.print(f"[red]cannot be promoted, it failed a check:[/red] {failure}")


def print_parity(report: ParityReport, page: Path) -> None:
    """Prints a parity report, and where its page is."""
    table = Table("check", "", "found", "expected", box=None)
    for check in report.checks:
        table.add_row(
            check.name, "passed" if check.passed else "[red]failed[/red]", escape(check.found), escape(check.expected)
        )
    output.print(table)
    output.print(f"\n{report.examples} examples compared in {report.seconds:.0f} s; with pictures: {page}")


def evaluation_table(manifest: Manifest) -> Table:
    """The table of base, merged and GPTQ: quality with 95 % intervals, size, load time, speed."""
    table = Table("", "exact match", "valid JSON", "NLL / token", "size", "load", "tokens/s", box=None)
    if manifest.base_evaluation:
        table.add_row("base", *_quality(manifest.base_evaluation), "", "", "")
    for format, record in manifest.formats.items():
        if record.evaluation:
            table.add_row(format.value, *_quality(record.evaluation), *_files(record))
    return table


def _quality(report: EvaluationReport) -> tuple[str, str, str]:
    return str(report.exact_match), str(report.valid_json or "-"), str(report.nll)


def _files(record: FormatRecord) -> tuple[str, str, str]:
    load = f"{record.load_seconds:.1f} s" if record.load_seconds is not None else "-"
    speed = f"{record.tokens_per_second:.0f}" if record.tokens_per_second is not None else "-"
    return f"{record.bytes / 1e6:.0f} MB", load, speed
