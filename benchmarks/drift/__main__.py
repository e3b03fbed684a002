"""Measures false alarms and delays of drift detection on replays, compared with Kolmogorov-Smirnov and PSI."""

from collections.abc import Iterable
from dataclasses import asdict

import click
import numpy as np

from benchmarks.drift.replay import REQUESTS, Found, Job, Quiet, run_all
from benchmarks.drift.streams import WITH_CHANGE, WITHOUT_CHANGE
from svc.invocation import print_json
from svc.terminal import output

CHANGES_A_REPLAY = 8
"""Replays of each changing stream per replay of a stream without a change. Changing streams are short."""
PER_REQUESTS = 10_000


def upper_limit(events: int) -> float:
    """Return the one-sided upper 95% confidence limit for a Poisson mean, given one observed count."""
    from scipy.stats import chi2

    return float(chi2.ppf(0.95, 2 * (events + 1)) / 2)


def delays(values: Iterable[int | None]) -> str:
    """Return the median and 95th percentile of the delays. A stream without an alarm has an infinite delay."""
    ordered = sorted(float("inf") if value is None else value for value in values)
    cells = [ordered[min(len(ordered) - 1, int(np.ceil(share * len(ordered))) - 1)] for share in (0.5, 0.95)]
    return " / ".join("never" if np.isinf(cell) else f"{cell:.0f}" for cell in cells)


@click.command()
@click.option(
    "--replays",
    default=4,
    show_default=True,
    help=f"Number of replays of each stream without a change ({REQUESTS:,} requests each).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(replays: int, as_json: bool) -> None:
    """Measure false alarms and detection delays on prompt streams."""
    from rich.table import Table

    jobs = [Job(name, True, seed) for name in WITH_CHANGE for seed in range(replays * CHANGES_A_REPLAY)]
    jobs += [Job(name, False, seed) for name in WITHOUT_CHANGE for seed in range(replays)]
    results = list(zip(jobs, run_all(jobs), strict=True))
    if as_json:
        print_json([{**asdict(job), **asdict(result)} for job, result in results])
        return
    quiet = Table("without a change", "alarms", "in 10,000 at most", "in alarm", "compared", "KS", "PSI", box=None)
    for name in WITHOUT_CHANGE:
        replays_of = [result for job, result in results if job.name == name and isinstance(result, Quiet)]
        requests, alarms = sum(each.requests for each in replays_of), sum(each.alarms for each in replays_of)
        quiet.add_row(
            name,
            f"{alarms} in {requests:,}",
            f"{upper_limit(alarms) / requests * PER_REQUESTS:.2f}",
            f"{sum(each.in_alarm for each in replays_of) / requests:.1%}",
            f"{sum(each.kept for each in replays_of) / requests:.0%}",
            f"{sum(each.by_ks for each in replays_of) / requests * PER_REQUESTS:.0f}",
            f"{sum(each.by_psi for each in replays_of) / requests * PER_REQUESTS:.0f}",
        )
    output.print(quiet)
    changed = Table("with a change", "requests until the alarm", "of those compared", "first seen in", box=None)
    for name in WITH_CHANGE:
        delayed = [result for job, result in results if job.name == name and isinstance(result, Found)]
        features = [each.feature for each in delayed if each.feature]
        changed.add_row(
            name,
            delays(each.requests for each in delayed),
            delays(each.kept for each in delayed),
            max(set(features), key=features.count) if features else "",
        )
    output.print(changed)
    output.print(
        "median / 95th percentile; in 10,000 at most: upper 95% limit; KS, PSI: batches flagged as drift in 10,000"
    )


if __name__ == "__main__":
    main()
