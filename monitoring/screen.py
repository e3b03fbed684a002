"""The status of a server as a person reads it."""

from typing import Any

from rich.table import Table

from monitoring.figures import QUANTILES, Figures, VersionFigures
from svc.terminal import output


def print_status(url: str, state: dict[str, Any], figures: Figures) -> None:
    """Prints to stdout.

    Args:
        state: the server's own word, from /svc/status.
        figures: what its metrics say.
    """
    engine, requests = state["engine"], state["requests"]
    colour = "green" if engine["state"] == "ready" else "red"
    output.print(f"{url}  [bold]{state['version']}[/bold] ({state['format']})  before: {state['previous'] or 'none'}")
    output.print(f"engine [{colour}]{engine['state']}[/{colour}], {engine['restarts']} restarts; ", end="")
    output.print(f"{requests['running']} requests running, {requests['held']} held")
    if engine["last_error"]:
        output.print(f"last error: {engine['last_error']}", style="yellow", markup=False)
    if state["last_swap"]:
        output.print(_swap(state["last_swap"]), markup=False)
    output.print(_table(figures))
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(figures.errors.items()))
    output.print(f"errors by reason: {reasons or 'none'}")


def _swap(swap: dict[str, Any]) -> str:
    text = f"last swap: to {swap['to']}, {swap['outcome'] or 'under way'}, {swap['started_at']}"
    if swap["seconds"] is not None:
        text += f", {swap['seconds']:.2f} s, {swap['running']} running, {swap['held']} held"
    return text


def _table(figures: Figures) -> Table:
    table = Table(
        "version", "requests", "errors", "tokens in/out", "latency p50/p95/p99", "first token p50/p95/p99", box=None
    )
    for version in figures.versions.values():
        tokens = f"{version.tokens_in}/{version.tokens_out}"
        table.add_row(version.version, str(version.requests), str(version.errors), tokens, *_latency(version))
    return table


def _latency(version: VersionFigures) -> tuple[str, str]:
    return _quantiles(version.duration_s), _quantiles(version.first_token_s)


def _quantiles(values: dict[str, float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{values[quantile]:.3f}" if quantile in values else "-" for quantile in QUANTILES) + " s"
