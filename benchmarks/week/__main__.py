"""`make bench-week`: simulates the week, evaluates the alert rules and checks for the expected alerts."""

import logging
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.table import Table

from benchmarks.week.drift import CHECK_MINUTES, DriftMonitor
from benchmarks.week.expected import Row, compare, read_expected
from benchmarks.week.rules import PROMTOOL, Series, evaluate
from benchmarks.week.server import Server
from benchmarks.week.timetable import MINUTE_S, moment
from benchmarks.week.traffic import Clients
from svc.terminal import console, counting, output

DRIFT = "SvcDrift"
"""The only expected alert that depends on the drift checks."""


@click.command()
@click.option("--seed", default=1, show_default=True, help="Seed of the traffic.")
@click.option("--folder", type=click.Path(path_type=Path), help="Folder in which to keep the promtool tests.")
@click.option("--drift/--no-drift", default=True, help="Check the traffic for drift (takes most of the time).")
@click.option("--promtool", type=click.Path(path_type=Path), default=PROMTOOL, show_default=True)
def main(seed: int, folder: Path | None, promtool: Path, *, drift: bool) -> None:
    """Simulate a week of traffic, and exit with code 1 if its alerts differ from expected.yml."""
    logging.disable(logging.WARNING)  # each drift alarm logs a warning
    with TemporaryDirectory(prefix="week") as scratch:
        tests = (folder or Path(scratch)).absolute()
        tests.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        monitor = DriftMonitor(Path(scratch) / "home", checking=drift)
        series = run_week(seed, monitor)
        simulated = time.monotonic()
        console.print(f"simulated the week in {simulated - began:.0f} s; evaluating the rules")
        for target, alarm in monitor.alarms():
            ended = moment(alarm.ended_at.timestamp()) if alarm.ended_at else "-"
            console.print(f"drift: {target} {alarm.signal} from {moment(alarm.called_at.timestamp())} to {ended}")
        rows = compare(
            [alert for alert in read_expected() if drift or alert.alert != DRIFT],
            evaluate(series, promtool.absolute(), tests),
        )
        console.print(f"evaluated the rules in {time.monotonic() - simulated:.0f} s")
    output.print(table(rows))
    sys.exit(not all(row.as_expected for row in rows))


def run_week(seed: int, monitor: DriftMonitor) -> Series:
    """Simulate a week and return its metric series."""
    server, series = Server(), Series()
    targets = list(server.targets.values())
    drift = monitor.drift_pages(0, [], targets, [])
    series.add(server.page() | drift)
    minutes = list(Clients(seed).minutes())
    with counting("simulated minutes", len(minutes)) as advance:
        for minute, arrivals in enumerate(minutes, start=1):
            page = server.minute((minute - 1) * MINUTE_S, arrivals)
            if minute % CHECK_MINUTES == 0 or server.holdouts or targets != [*server.targets.values()]:
                targets = list(server.targets.values())
                drift = monitor.drift_pages(minute, server.records, targets, server.holdouts)
                server.records, server.holdouts = [], []
            series.add(page | drift)
            advance()
    return series


def table(rows: list[Row]) -> Table:
    """Return a table of expected and actual alerts."""
    table = Table("", "alert", "labels", "must begin", "begins", "must end", "ends", box=None)
    for row in rows:
        alert = row.found or row.expected
        assert alert is not None
        labels = ", ".join(value for name, value in alert.labels if name != "severity")
        begins, ends = (
            [" - ".join(_moment(minute) for minute in pair) for pair in (row.expected.begins, row.expected.ends)]
            if row.expected
            else ["", ""]
        )
        actual = [_moment(row.found.begins), _moment(row.found.ends)] if row.found else ["never", ""]
        table.add_row("ok" if row.as_expected else "WRONG", alert.alert, labels, begins, actual[0], ends, actual[1])
    return table


def _moment(minute: int) -> str:
    return moment(minute * MINUTE_S)


if __name__ == "__main__":
    main()
