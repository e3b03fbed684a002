"""Renders the screen that `svc status` shows."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from monitoring.status.figures import QUANTILES, Figures, Rate, StatusView
from svc.store.rollout_text import SIGNAL_COLUMNS, place_of, signal_cells
from svc.store.rollouts import RolloutView

_DRIFT_COLOURS = {"alarm": "red", "changed": "red", "steady": "green", "as_registered": "green"}
_VERDICT_COLOURS = {"passed": "green", "failed": "red"}


def status_screen(
    view: StatusView, rates: Mapping[str, Rate] | None = None, *, verbose: bool = False
) -> RenderableType:
    """Render the screen that `svc status` shows.

    Args:
        rates: each version's requests and tokens per second, or None if there was only one reading.
        verbose: also show the settings of each model's engine, with their origins and reasons.
    """
    state, figures = view.state, view.figures
    lines: list[RenderableType] = [Text(view.url)]
    for model in state["models"]:
        lines += _model(model, view.drift.get(model["model"], {}), verbose=verbose)
    lines += [Text(f"{name} is not served: {why}", "red") for name, why in state["refused"].items()]
    if len(servers := state.get("servers", ())) > 1:
        lines.append(_servers(servers, this=state["server"]))
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(figures.errors.items()))
    return Group(*lines, _table(figures, rates), Text(f"errors by reason: {reasons or 'none'}"))


def _model(state: Mapping[str, Any], drift: Mapping[str, str], *, verbose: bool) -> list[RenderableType]:
    engine, requests, engines = state["engine"], state["requests"], state["engines"]
    lines: list[RenderableType] = [
        Text.assemble((state["version"], "bold"), f" ({state['format']})  previous: {state['previous'] or 'none'}"),
        Text.assemble(
            "  engine ",
            (engine["state"], "green" if engine["state"] == "ready" else "red"),
            f", {engine['restarts']} restarts; {requests['running']} requests running, {requests['queued']} queued",
        ),
    ]
    if len(engines) > 1:
        for replica in engines:
            version = f" with {replica['version']}" if replica["version"] else ""
            lines.append(_replica(replica, f"{replica['state']}{version}, {replica['running']} running"))
    if scaling := state.get("scaling"):
        refused = f"; no more can be added: {scaling['refused']}" if scaling["refused"] else ""
        lines.append(Text(f"  {scaling['replicas']} replicas (from {scaling['min']} to {scaling['max']}){refused}"))
    lines += [_replica(each, each["verification"], "yellow") for each in engines if each.get("verified") is False]
    for replica in engines:
        adapters = replica.get("adapters")
        if adapters is not None:
            loaded = [f"{each['version']}{'' if each['verified'] else ' (not verified)'}" for each in adapters]
            lines.append(_replica(replica, f"adapters loaded: {', '.join(loaded) or 'none'}"))
    if engine["last_error"]:
        lines.append(Text(f"  last error: {engine['last_error']}", "yellow"))
    if state.get("store") == "unavailable":
        lines.append(Text("  store: unavailable; last swap, rollout and held-out evaluations are not shown", "red"))
    if state["last_swap"]:
        lines.append(Text(_swap(state["last_swap"])))
    if state.get("rollout"):
        lines += _rollout(RolloutView.model_validate(state["rollout"]))
    lines.append(_drift(drift))
    if verbose:
        lines.append(_plan(engine["plan"]))
    return lines


def _servers(servers: Sequence[Mapping[str, Any]], this: str) -> RenderableType:
    table = Table("server", "serves", "last seen (UTC)", "leads", box=None)
    for server in servers:
        address = f"{server['address']} (this one)" if server["id"] == this else server["address"]
        serves = ", ".join(server["serves"]) or "nothing yet" if server["running"] else "stopped reporting"
        seen = server["seen_at"][:19].replace("T", " ")
        leads = ", ".join("everything else" if name == "*" else name for name in server["leads"])
        table.add_row(address, serves, seen, leads or "-", style="" if server["running"] else "red")
    return table


def _replica(engine: Mapping[str, Any], text: str, style: str = "") -> Text:
    return Text(f"    replica {engine['replica']}: {text}", style)


def _plan(rows: Sequence[Mapping[str, Any]] | None) -> RenderableType:
    if rows is None:
        return Text("engine: not started", "dim")
    table = Table("engine", "value", "origin", "reason", box=None)
    for row in rows:
        table.add_row(*(Text(str(row[key])) for key in ("name", "value", "origin", "reason")))
    return table


def _drift(drift: Mapping[str, str]) -> Text:
    if not drift:
        return Text("  drift: not checked; run `svc monitor`", "dim")
    text = Text("  drift: ")
    for name, status in drift.items():
        text.append(f"{name} ").append(status.replace("_", " "), _DRIFT_COLOURS.get(status, "")).append("  ")
    return text


def _swap(swap: Mapping[str, Any]) -> str:
    text = f"  last swap: to {swap['to']}, {swap['outcome'] or 'in progress'}, {swap['started_at']}"
    if swap["kind"] is not None:
        text += f", {swap['kind']} in {swap['took_s']:.1f} s, {swap['running']} running"
    if swap["queued_s"] is not None:
        text += f", {swap['queued']} queued for {swap['queued_s']:.2f} s"
    return text


def _rollout(rollout: RolloutView) -> list[RenderableType]:
    took = timedelta(seconds=max(0, round((datetime.now(UTC) - rollout.step_began_at).total_seconds())))
    place = Text.assemble(
        f"  rollout {rollout.id}: {rollout.previous} -> {rollout.version}, ",
        (place_of(rollout), "bold"),
        f" for {took}",
    )
    if not rollout.signals:
        return [place]
    table = Table(*SIGNAL_COLUMNS, box=None, pad_edge=False)
    for signal in rollout.signals:
        table.add_row(*signal_cells(signal), style=_VERDICT_COLOURS.get(signal.outcome, ""))
    return [place, Padding(table, (0, 0, 0, 4))]


def _table(figures: Figures, rates: Mapping[str, Rate] | None) -> Table:
    speeds = [] if rates is None else ["requests/s", "tokens/s"]
    latencies = ["latency p50/p95/p99", "first token p50/p95/p99"]
    table = Table("version", "requests", "errors", "tokens in/out", *speeds, *latencies, box=None)
    for version in figures.versions.values():
        cells = [version.version, str(version.requests), str(version.errors)]
        cells.append(f"{version.tokens_in}/{version.tokens_out}")
        if rates is not None:
            rate = rates.get(version.version)
            cells += [f"{rate.requests:.1f}", f"{rate.tokens_out:.0f}"] if rate else ["-", "-"]
        table.add_row(*cells, _quantiles(version.duration_s), _quantiles(version.first_token_s))
    return table


def _quantiles(values: Mapping[str, float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{values[quantile]:.3f}" if quantile in values else "-" for quantile in QUANTILES) + " s"
