"""How many requests until drift is seen, and how many false alarms that costs: ours beside Kolmogorov-Smirnov and PSI.

Streams of real prompts are replayed through the code that watches traffic. A stream with a shift begins with prompts
like the held-out ones, for a random number of requests; the delay counts from the first shifted prompt. All methods see
the same requests in the same windows, and one that is calibrated has the same budget of false alarms.

No threshold here comes from a shifted prompt: ours and Kolmogorov-Smirnov's are levels of exact tests, PSI's are
quantiles of PSI between samples that are drawn alike.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np

from monitoring.drift.detector import Detector, Test, Watch
from monitoring.drift.signals import input_tests
from monitoring.drift.two_sample.alpha_spending import FALSE_ALARMS_PER_REQUEST, SIGNAL_SHARES, WINDOWS, Signal, Window
from monitoring.drift.two_sample.univariate import compare_numbers, number_stability
from svc.dataset.readers.reader import read_examples
from svc.drift_reference.prompt import Prompt, PromptFeature, PromptSampler
from svc.drift_reference.sample import Floats, Sample
from svc.drift_reference.text_embedding import fit_text_space
from svc.terminal import counting, output

ROOT = Path(__file__).parents[1]
TASK = ROOT / "examples" / "debian-triage"
STREAMS = ROOT / "benchmarks" / "drift"
CUSTOMARY_P, CUSTOMARY_PSI = 0.05, 0.2
CUSTOMARY_SIZE = 100
"""A customary check compares a batch of so many requests, and then the next one."""
MOST_BEFORE, FEWEST_BEFORE = 200, 100
"""Requests before the shift."""
PER_REQUESTS = 10_000
_TOGETHER = 25
_SIMULATED = 4_000_000
_SHARE = SIGNAL_SHARES[Signal.INPUT]


@dataclass(frozen=True, slots=True)
class StabilityTest:
    """PSI of one feature against fixed thresholds.

    Args:
        thresholds: by size of the window.
    """

    name: str
    reference: Floats
    thresholds: dict[int, float]
    share: float = 1.0

    def p_value(self, live: Sample, alpha: float, seed: Sequence[int]) -> float:
        """0 beyond the threshold, else 1: PSI has none of its own."""
        threshold = self.thresholds.get(live.size, CUSTOMARY_PSI)
        return float(number_stability(self.reference, live.numbers[self.name]).index <= threshold)


@dataclass(frozen=True, slots=True)
class KolmogorovTest:
    """Kolmogorov and Smirnov's test of one feature."""

    name: str
    reference: Floats
    share: float

    def p_value(self, live: Sample, alpha: float, seed: Sequence[int]) -> float:
        """Exact."""
        return compare_numbers(self.reference, live.numbers[self.name])


@dataclass(frozen=True, slots=True)
class CustomaryWindow(Window):
    """Compared at one level, whatever that costs."""

    def alpha(self, rate: float) -> float:
        """The customary one."""
        return CUSTOMARY_P


@dataclass(frozen=True)
class Method:
    """A way to look for drift: from a reference to its detector."""

    name: str
    features: tuple[str, ...]
    detector: Callable[[Sample, tuple[str, ...]], Detector]


def _ours(reference: Sample, features: tuple[str, ...]) -> Detector:
    return Detector(input_tests(reference), reference.size, _SHARE)


def _kolmogorov(reference: Sample, features: tuple[str, ...]) -> Detector:
    return Detector(_kolmogorov_tests(reference, features, 1 / len(features)), reference.size, _SHARE)


def _kolmogorov_customary(reference: Sample, features: tuple[str, ...]) -> Detector:
    return Detector(_kolmogorov_tests(reference, features, 1.0), reference.size, 1.0, windows=_CUSTOMARY)


def _kolmogorov_tests(reference: Sample, features: tuple[str, ...], share: float) -> list[Test]:
    return [KolmogorovTest(name, reference.numbers[name], share) for name in features]


def _stability(reference: Sample, features: tuple[str, ...]) -> Detector:
    thresholds = {
        window.size: stability_threshold(
            reference.size, window.size, window.alpha(FALSE_ALARMS_PER_REQUEST * _SHARE) / len(features)
        )
        for window in WINDOWS
    }
    tests = [StabilityTest(name, reference.numbers[name], thresholds) for name in features]
    return Detector(tests, reference.size, _SHARE)


def _stability_customary(reference: Sample, features: tuple[str, ...]) -> Detector:
    tests = [StabilityTest(name, reference.numbers[name], {}) for name in features]
    return Detector(tests, reference.size, 1.0, windows=_CUSTOMARY)


@cache
def stability_threshold(reference: int, size: int, alpha: float) -> float:
    """The PSI that a window exceeds with probability alpha where nothing has moved, by simulation.

    PSI knows counts in the reference's deciles only. The true shares of those are a Dirichlet variable, since the
    deciles are a sample's; the window's counts are multinomial given them.
    """
    generator = np.random.default_rng((reference, size))
    largest: Floats = np.empty(0)
    keep = max(1, round(alpha * _SIMULATED))
    expected = (reference / 10 + 0.5) / (reference + 5)
    for _ in range(_SIMULATED // 100_000):
        shares = generator.dirichlet(np.full(10, reference / 10), 100_000)
        actual = (generator.multinomial(size, shares) + 0.5) / (size + 5)
        found = ((actual - expected) * np.log(actual / expected)).sum(axis=1)
        largest = np.sort(np.concatenate([largest, found]))[-keep - 1 :]
    return float(largest[0])


_CUSTOMARY = (CustomaryWindow(size=CUSTOMARY_SIZE, every=CUSTOMARY_SIZE, share=1.0),)
_ALL = (
    PromptFeature.CHARACTERS.value,
    PromptFeature.DISTINCT_WORDS.value,
    PromptFeature.UNKNOWN_WORDS.value,
    PromptFeature.WORD_LENGTH.value,
    PromptFeature.SYMBOLS.value,
)
_LENGTH = (PromptFeature.CHARACTERS.value,)
OURS = Method("ours", (), _ours)
CALIBRATED = (
    OURS,
    Method("KS, five features", _ALL, _kolmogorov),
    Method("KS, length", _LENGTH, _kolmogorov),
    Method("PSI, five features", _ALL, _stability),
    Method("PSI, length", _LENGTH, _stability),
)
CUSTOMARY = (
    Method(f"KS, five features, p < {CUSTOMARY_P}", _ALL, _kolmogorov_customary),
    Method(f"KS, length, p < {CUSTOMARY_P}", _LENGTH, _kolmogorov_customary),
    Method(f"PSI, five features, > {CUSTOMARY_PSI}", _ALL, _stability_customary),
    Method(f"PSI, length, > {CUSTOMARY_PSI}", _LENGTH, _stability_customary),
)
METHODS = {method.name: method for method in (*CALIBRATED, *CUSTOMARY)}


@dataclass(frozen=True)
class Streams:
    """What is replayed.

    Attributes:
        reference: the held-out prompts.
        alike: prompts that are drawn as those were.
        shifted: other prompts, by grade.
    """

    reference: Sample
    alike: Sample
    shifted: dict[str, Sample]


def read_streams(train: Path, heldout: Path, alike: Path, shifted: Path) -> Streams:
    """Reads the files and makes samples of them, in a text space of the training examples."""
    examples = read_examples(train)
    space = fit_text_space([e.prompt[-1].content for e in examples], [e.answer for e in examples])
    sampler = PromptSampler(space)

    def sample(texts: Sequence[str]) -> Sample:
        return sampler.sample([Prompt(text) for text in texts])

    grades: dict[str, list[str]] = {}
    for line in shifted.read_text("utf-8").splitlines():
        row = json.loads(line)
        grades.setdefault(row["grade"], []).append(row["prompt"])
    alike_texts = [json.loads(line)["prompt"] for line in alike.read_text("utf-8").splitlines()]
    return Streams(
        sample([example.prompt[-1].content for example in read_examples(heldout)]),
        sample(alike_texts),
        {grade: sample(texts) for grade, texts in grades.items()},
    )


def alarms(detector: Detector, stream: Sample) -> Iterator[int]:
    """Places at which alarms begin, requests."""
    watch = Watch()
    while watch.position < stream.size:
        new = min(_TOGETHER, stream.size - watch.position)
        start = max(0, watch.position - detector.memory)
        watch, events = detector.advance(watch, stream.part(start, watch.position + new), new)
        yield from (event.position for event in events if event.alarm)


def false_alarms(streams: Streams, method: str, seed: int, *, redraw: bool) -> tuple[int, int]:
    """Alarms in one stream of prompts like the held-out ones, and its requests.

    Args:
        redraw: hold out other prompts each time, of all that are alike.
    """
    generator = np.random.default_rng((1, seed))
    reference, alike = streams.reference, streams.alike
    if redraw:
        order = generator.permutation(reference.size + alike.size)
        both = reference.followed_by(alike)
        reference, alike = both.at(order[: reference.size]), both.at(order[reference.size :])
    else:
        alike = alike.at(generator.permutation(alike.size))
    detector = METHODS[method].detector(reference, METHODS[method].features)
    return len(list(alarms(detector, alike))), alike.size


def delay(streams: Streams, method: str, grade: str, seed: int) -> int | None:
    """Shifted requests until the alarm; None where there was none, or one before the shift."""
    generator = np.random.default_rng((2, seed))
    before = int(generator.integers(FEWEST_BEFORE, MOST_BEFORE, endpoint=True))
    prefix = streams.alike.at(generator.permutation(streams.alike.size)[:before])
    shifted = streams.shifted[grade]
    stream = prefix.followed_by(shifted.at(generator.permutation(shifted.size)))
    detector = METHODS[method].detector(streams.reference, METHODS[method].features)
    first = next(alarms(detector, stream), 0)
    return first - before if first > before else None


@dataclass(frozen=True, slots=True)
class Job:
    """One replay, many times over.

    Attributes:
        grade: of the shift; empty for a stream without one.
        redraw: hold out other prompts each time.
    """

    method: str
    grade: str = ""
    redraw: bool = False


Outcome = tuple[int, int] | int | None
_streams: Streams | None = None


def _prepare(paths: tuple[Path, Path, Path, Path]) -> None:
    global _streams
    _streams = read_streams(*paths)


def _replay(job: Job, seed: int) -> Outcome:
    assert _streams is not None
    if job.grade:
        return delay(_streams, job.method, job.grade, seed)
    return false_alarms(_streams, job.method, seed, redraw=job.redraw)


def replay(jobs: Sequence[Job], paths: tuple[Path, Path, Path, Path], replays: int) -> dict[Job, list[Outcome]]:
    """Replays everything, one process a core."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _prepare, (paths,))
    with pool, counting("replays", len(jobs) * replays) as advance:
        running = {job: [pool.submit(_replay, job, seed) for seed in range(replays)] for job in jobs}
        for future in (future for futures in running.values() for future in futures):
            future.add_done_callback(lambda _: advance())
        return {job: [future.result() for future in futures] for job, futures in running.items()}


def rate(outcomes: Sequence[Outcome]) -> str:
    """False alarms in 10,000 requests."""
    found = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    alarms, requests = sum(count for count, _ in found), sum(size for _, size in found)
    return f"{alarms / requests * PER_REQUESTS:.2f} ({alarms} in {requests:,})"


def quantile(outcomes: Sequence[Outcome], share: float) -> float:
    """Of delays; a stream without an alarm is longer than any."""
    delays = sorted(float(value) if isinstance(value, int) else np.inf for value in outcomes)
    return delays[min(len(delays) - 1, int(np.ceil(share * len(delays))) - 1)]


def delays(outcomes: Sequence[Outcome]) -> str:
    """Median and 95th percentile."""
    cells = [quantile(outcomes, share) for share in (0.5, 0.95)]
    return " / ".join("never" if np.isinf(cell) else f"{cell:.0f}" for cell in cells)


@click.command()
@click.option("--replays", default=200, show_default=True, help="Of each stream.")
@click.option("--train", type=click.Path(path_type=Path, exists=True), default=TASK / "train.jsonl")
@click.option("--heldout", type=click.Path(path_type=Path, exists=True), default=TASK / "heldout.jsonl")
@click.option("--alike", type=click.Path(path_type=Path, exists=True), default=STREAMS / "in_distribution.jsonl")
@click.option("--shifted", type=click.Path(path_type=Path, exists=True), default=STREAMS / "shifted.jsonl")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def main(replays: int, train: Path, heldout: Path, alike: Path, shifted: Path, as_json: bool) -> None:
    """Measure false alarms and delays on streams of prompts; other streams can be named."""
    from rich.table import Table

    from svc.terminal import print_json

    grades = list(dict.fromkeys(json.loads(line)["grade"] for line in shifted.read_text("utf-8").splitlines()))
    jobs = [Job(name, redraw=redraw) for name in METHODS for redraw in (False, True)]
    jobs += [Job(method.name, grade) for method in CALIBRATED for grade in grades]
    outcomes = replay(jobs, (train, heldout, alike, shifted), replays)
    if as_json:
        print_json([{**asdict(job), "outcomes": found} for job, found in outcomes.items()])
        return
    table = Table("", f"false alarms in {PER_REQUESTS:,}", "other prompts held out each time", *grades, box=None)
    for name in METHODS:
        false = [rate(outcomes[Job(name, redraw=redraw)]) for redraw in (False, True)]
        found = [outcomes.get(Job(name, grade)) for grade in grades]
        table.add_row(name, *false, *("" if cells is None else delays(cells) for cells in found))
    output.print(
        f"{replays} replays of each stream; by grade, median / p95 of the requests from the shift to the alarm"
    )
    output.print(table)


if __name__ == "__main__":
    main()
