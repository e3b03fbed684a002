"""Counts wrong, missed and late decisions of simulated canary rollouts, in comparison with Argo Rollouts and
Flagger.
"""

import os

import click

from benchmarks.rollout.simulation import Job, Result, run_all, with_calibrated
from benchmarks.rollout.table import lines
from benchmarks.rollout.traffic import AT_MARGIN, BAD, EQUAL, Kind
from serving.rollout.analysis.betting import Budget
from svc.invocation import print_json
from svc.terminal import output

_QUICK = 20


@click.command()
@click.option("--rollouts", default=1000, show_default=True, help="Simulated rollouts of each kind.")
@click.option("--quick", is_flag=True, help=f"Simulate {_QUICK} rollouts of each kind.")
@click.option("--processes", default=os.cpu_count() or 1, show_default="one per core", help="Number of processes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def main(rollouts: int, quick: bool, processes: int, as_json: bool) -> None:
    """Simulate canary rollouts and print how they are decided."""
    kinds = [*EQUAL, *AT_MARGIN, *BAD]
    jobs = [Job(kind, seed) for seed in range(_QUICK if quick else rollouts) for kind in kinds]
    results: dict[Kind, list[Result]] = {kind: [] for kind in kinds}
    for job, result in zip(jobs, run_all(jobs, processes), strict=True):
        results[job.kind].append(result)
    decisions = with_calibrated(results, Budget().wrong_rollback)
    if as_json:
        print_json(
            [
                {"kind": kind.name, "policy": policy, "end": each.end, "exposed": each.exposed, "after_s": each.after_s}
                for kind, of_kind in decisions.items()
                for policy, all_of in of_kind.items()
                for each in all_of
            ]
        )
        return
    for line in lines(decisions):
        output.print(line, markup=False, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
