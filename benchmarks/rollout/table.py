"""Formats the tables of decisions in Markdown.

For equal candidates: the share of wrong rollbacks, with the upper limit of its 95% interval. For others: requests to
the candidate before the rollback (median / 95th percentile of all rollouts), and the share of missed bad candidates.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from benchmarks.rollout.canary import Decision, End
from benchmarks.rollout.simulation import OURS, POLICIES, Decisions
from benchmarks.rollout.traffic import AT_MARGIN, BAD, EQUAL, Kind


def upper_limit(events: int, trials: int) -> float:
    """Return the upper limit of Clopper and Pearson's 95% interval of a probability."""
    from scipy.stats import beta

    return float(beta.ppf(0.975, events + 1, trials - events)) if events < trials else 1.0


def lines(decisions: dict[Kind, Decisions]) -> Iterator[str]:
    """Yield the lines of both tables, with a row for each policy: equal candidates, then the others."""
    equal = {kind.name.removeprefix("equal, "): decisions[kind] for kind in EQUAL}
    equal["all four"] = {name: [each for kind in EQUAL for each in decisions[kind][name]] for name in POLICIES}
    yield from _table("equal candidates", equal, _wrong)
    yield ""
    yield from _table("other candidates", {kind.name: decisions[kind] for kind in (*AT_MARGIN, *BAD)}, _missed)


def _table(title: str, kinds: dict[str, Decisions], cell: Callable[[Sequence[Decision]], str]) -> Iterator[str]:
    def row(name: str, cells: Iterable[str]) -> str:
        return f"| {' | '.join((name, *cells))} |"

    yield row(title, kinds)
    yield row("---", ["---"] * len(kinds))
    yield row("rollouts", (f"{len(of[OURS]):,}" for of in kinds.values()))
    for name in POLICIES:
        yield row(name, (cell(of[name]) for of in kinds.values()))
    yield row(f"undecided in {OURS}", (_share(of[OURS], End.UNDECIDED) for of in kinds.values()))


def _wrong(decisions: Sequence[Decision]) -> str:
    """Return the share of wrong rollbacks with its upper limit."""
    wrong = sum(each.end is End.ROLLED_BACK for each in decisions)
    return f"{wrong / len(decisions):.1%} (at most {upper_limit(wrong, len(decisions)):.1%})"


def _missed(decisions: Sequence[Decision]) -> str:
    """Return the exposed requests, and the share of rollouts that the policy completed."""
    return f"{_exposed(decisions)} ({_share(decisions, End.FULL)})"


def _share(decisions: Sequence[Decision], end: End) -> str:
    return f"{np.mean([each.end is end for each in decisions]):.0%}"


def _exposed(decisions: Sequence[Decision]) -> str:
    """Return the median and 95th percentile of the requests to the candidate before the rollback, or "never"."""
    ordered = sorted(each.exposed if each.end is End.ROLLED_BACK else float("inf") for each in decisions)
    cells = [ordered[int(np.ceil(rank * len(ordered))) - 1] for rank in (0.5, 0.95)]
    return " / ".join("never" if np.isinf(cell) else f"{cell:,.0f}" for cell in cells)
