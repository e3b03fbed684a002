"""Prints a version on one screen: its base and data, and the quality, size and speed of each format."""

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from svc.evaluation.forgetting import Forgetting
from svc.evaluation.judge import JudgeReport
from svc.evaluation.preference import PREFERENCE_TITLES, PreferenceReport
from svc.evaluation.verdict import GateOutcome
from svc.registry.manifest import FormatRecord, Manifest
from svc.registry.parity import ParityReport
from svc.terminal import output
from svc.version import Format


def print_version(manifest: Manifest, folder: Path) -> None:
    """Print a version to stdout."""
    base, data = manifest.base, manifest.data
    output.print(f"[bold]{manifest.id}[/bold]  {folder}")
    given = manifest.adapter_origin
    origin = f"with {given}" if given else f"trained on {data.train_examples} examples"
    output.print(f"base {base.origin} (license: {base.licence or 'unknown'}), {origin}", markup=False, soft_wrap=True)
    if template := manifest.recipe.get("chat_template"):
        output.print(f"chat template: {template} (chat_template in the recipe)", markup=False, soft_wrap=True)
    evaluated = f"evaluated on {manifest.judged_examples} of {data.heldout_examples} held-out examples"
    primary = f"; primary metric: {manifest.primary_title}" if manifest.judged_examples else ""
    selection = f"; {data.selection}" if manifest.judged_examples and data.selection else ""
    output.print(f"{evaluated}{primary}{selection}\n", soft_wrap=True)
    output.print(evaluation_table(manifest))
    if manifest.preferences:
        output.print()
        output.print(_preference_table(manifest.preferences))
    if manifest.forgetting:
        output.print()
        output.print(_forgetting_table(manifest.forgetting))
    if manifest.judge:
        output.print(f"\n{_judge(manifest.judge)}", markup=False)
    for failure in manifest.failed:
        output.print(f"[red]cannot be promoted because of a failed check:[/red] {failure}")
    for gate in manifest.gates:
        if str(gate) not in manifest.failed:
            style = "yellow" if gate.verdict.outcome is GateOutcome.UNDECIDED else None
            output.print(str(gate), style=style, markup=False, soft_wrap=True)
    for finding in manifest.findings:
        output.print(f"\n[yellow]{finding.kind.words}:[/yellow] {escape(finding.what)}")
        output.print(f"  try: {escape(str(finding.advice))}")
        output.print(f"  rule: {escape(finding.rule)}", style="dim")
    if not manifest.findings:
        output.print("\ndiagnosis: no training faults found")
    output.print(f"\nfull report with plots and answers: svc report {manifest.id}")


def _forgetting_table(results: Mapping[Format, Forgetting]) -> Table:
    """Return a table of results on general questions, for the base and each format. For formats, the change from the
    base is also shown.
    """
    base, formats = next(iter(results.values())), results.values()
    table = Table(f"{base.examples} general questions", "base", *results, box=None)
    table.add_row("right answers", str(base.before), *(str(result.after) for result in formats))
    table.add_row("change", "", *(str(result.difference) for result in formats))
    table.add_row("lost, gained", "", *(f"{result.lost}, {result.gained}" for result in formats))
    table.add_row("NLL / token", str(base.nll_before), *(str(result.nll_after) for result in formats))
    table.add_row("change", "", *(str(result.nll_difference) for result in formats))
    return table


def _preference_table(reports: Mapping[str, PreferenceReport]) -> Table:
    """Return a table of preference accuracy on held-out pairs, for the base and each format."""
    pairs = next(iter(reports.values())).pairs
    table = Table(f"{pairs} held-out pairs", *reports, box=None)
    for name, title in PREFERENCE_TITLES.items():
        cells = (report.figures.get(name) for report in reports.values())
        table.add_row(title, *("" if cell is None else str(cell) for cell in cells))
    return table


def _judge(report: JudgeReport) -> str:
    return (
        f"judged by {report.model} at {report.url}: merged wins {report.win_rate} of {report.pairs} pairs against the "
        f"base (ties count as half); agreement between the two orders {report.agreement}"
    )


def print_parity(report: ParityReport, page: Path) -> None:
    """Print a parity report and the path of its HTML page."""
    table = Table("check", "", "found", "expected", box=None)
    for check in report.checks:
        table.add_row(
            check.name, "passed" if check.passed else "[red]failed[/red]", escape(check.found), escape(check.expected)
        )
    output.print(table)
    output.print(f"\n{report.examples} examples compared in {report.seconds:.0f} s; report with plots: {page}")


def evaluation_table(manifest: Manifest) -> Table:
    """Return a table that compares the quality, size and speed of the base, merged and quantized models.

    Metrics are shown with 95% intervals, primary metric first.
    """
    records = {format.value: record for format, record in manifest.formats.items() if record.evaluation}
    reports = {"base": manifest.base_evaluation} | {name: record.evaluation for name, record in records.items()}
    judged = {name: report for name, report in reports.items() if report}
    table = Table("", *judged, box=None)
    titles = {name: figure.title for report in reversed(judged.values()) for name, figure in report.all_figures.items()}
    for name, title in titles.items():
        table.add_row(escape(title), *(str(report.all_figures[name].estimate) for report in judged.values()))
    for title, cell in _FILES.items():
        table.add_row(title, *(cell(records[name]) if name in records else "" for name in judged))
    return table


_FILES: dict[str, Callable[[FormatRecord], str]] = {
    "size": lambda record: f"{record.bytes / 1e6:.0f} MB",
    "load": lambda record: "-" if record.load_seconds is None else f"{record.load_seconds:.1f} s",
    "tokens/s": lambda record: "-" if record.tokens_per_second is None else f"{record.tokens_per_second:.0f}",
}
