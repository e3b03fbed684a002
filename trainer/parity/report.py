"""The parity report of a version: its files and the engine's answers beside what training had, check by check.

Everything is compared with the same held-out examples in the ids that training saw. How far two right implementations
differ on the same weights is measured with it, so that the limit of what is compared follows this machine's rounding.
Knows no thresholds but those below, each with where it comes from. Imports torch.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.evaluation.token_scores import Scores
from svc.registry.parity import Differences, ParityCheck, ParityReport
from svc.terminal import waiting
from svc.version import Format
from trainer.library_output import library_output_to_log
from trainer.model.peft_config import load_adapter
from trainer.model.release_memory import release_memory
from trainer.model.stored_weights import StoredWeights
from trainer.parity import adapter as adapter_parity
from trainer.parity import gptq as gptq_parity
from trainer.parity.files import other_config, other_files, unreadable_weights
from trainer.parity.scores import load, score, sum_in_float32
from trainer.qualification import EngineReading
from trainer.recipe.sections import Recipe

BESIDE_TRAINED = "merged: beside what was trained"
"""Name of the check to which all others lead."""
_NOT_THE_SUM = 1e-3
"""Share of a module's weights that may not be the sum within a step of bf16: sums near 0, whose terms cancel."""
_LEAST = 0.02
"""Nats a token. Where two models are nearly the same, whatever differs by less changes no answer."""
_TIMES_FLOOR = 3.0
"""Two sums of independent rounding differ by 1.4 times one; the rest is for few tokens."""
_MOST_FLOOR = 0.1
"""Nats a token in the mean. A right engine in bf16 differs from transformers by 0.01 to 0.03, a wrong one by nats."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a run has made.

    Attributes:
        adapter: None after full fine-tuning.
        formats: folders of those that will be served, each with what was read of it on the engine.
    """

    base: Path
    adapter: Path | None
    merged: Path
    formats: Mapping[Format, tuple[Path, EngineReading]]


def make_report(
    made: Made, recipe: Recipe, compared: Sequence[TokenizedExample], judged: int, *, number_type: NumberType
) -> ParityReport:
    """Makes the report.

    Args:
        compared: the examples whose scores the readings hold.
        judged: how many examples' prompts were compared.
        number_type: in which the trainer's own models compute.
    """
    started = time.monotonic()
    checks: list[ParityCheck] = []
    differences: dict[str, Differences] = {}
    for format, (folder, reading) in made.formats.items():
        checks += [*_check_files(made.base, folder, format), _check_tokens(format, reading, judged)]
    if all(check.passed for check in checks):  # what cannot be read cannot be compared
        with waiting("Comparing what is served with what was trained"), library_output_to_log():
            more, differences = _compare(made, recipe, compared, number_type)
        checks += more
    return ParityReport(
        checks=tuple(checks),
        differences=differences,
        speed={format: reading.speed for format, (_, reading) in made.formats.items()},
        examples=len(compared),
        seconds=time.monotonic() - started,
    )


def _check_files(base: Path, folder: Path, format: Format) -> list[ParityCheck]:
    unreadable, files = unreadable_weights(folder), ", ".join(other_files(base, folder))
    keys, same = ", ".join(other_config(base, folder)), "the base's, byte for byte"
    return [
        _check(f"{format}: files of weights", not unreadable, unreadable or "whole", "whole"),
        _check(f"{format}: tokenizer, template, generation", not files, f"{files} differ" if files else same, same),
        _check(f"{format}: config", not keys, f"other {keys}" if keys else "the base's", "the base's"),
    ]


def _check_tokens(format: Format, reading: EngineReading, judged: int) -> ParityCheck:
    wrong = reading.prompts_differ
    found = f"{judged - len(wrong)} of {judged} prompts equal"
    if wrong:
        found += f", the first other one is example {wrong[0] + 1}"
    return _check(f"{format}: tokens of the engine", not wrong, found, "the ids that training saw")


def _compare(
    made: Made, recipe: Recipe, compared: Sequence[TokenizedExample], number_type: NumberType
) -> tuple[list[ParityCheck], dict[str, Differences]]:
    checks: list[ParityCheck] = []
    differences: dict[str, Differences] = {}
    trained = None
    if made.adapter is not None:
        applied, trained = _read_trained(made.base, made.adapter, made.merged, compared, number_type)
        checks += _check_adapter(applied, adapter_parity.scale_of(made.adapter, recipe))
        release_memory()  # of one model, before the next is loaded
    whole = score(load(made.merged, number_type), compared)
    if trained is not None:
        merge = differences["merged beside trained, both in transformers"] = between(trained, whole)
        if Format.MERGED not in made.formats:
            checks.append(_at_most(BESIDE_TRAINED, merge, _MOST_FLOOR))
    if Format.MERGED in made.formats:
        _, reading = made.formats[Format.MERGED]
        floor, served = between(whole, reading.scores), between(trained or whole, reading.scores)
        differences["engine beside transformers, the same weights"] = floor
        differences["merged on the engine beside trained"] = served
        limit = min(_MOST_FLOOR, max(_LEAST, _TIMES_FLOOR * floor.mean))
        checks.append(_at_most("merged: the engine beside transformers, the same weights", floor, _MOST_FLOOR))
        checks.append(_at_most(BESIDE_TRAINED, served, limit))
    if Format.GPTQ in made.formats:
        folder, quantized = made.formats[Format.GPTQ]
        off, layer = gptq_parity.compare(folder, made.merged)
        found, most = f"{off:.3f} of a layer's length at most, in {layer}", gptq_parity.MOST_OFF
        checks.append(_check("gptq: rounding of weights", off <= most, found, f"at most {most}"))
        differences["gptq on the engine beside trained"] = between(trained or whole, quantized.scores)
    return checks, differences


def _read_trained(
    base: Path, adapter: Path, merged: Path, compared: Sequence[TokenizedExample], number_type: NumberType
) -> tuple[adapter_parity.Applied, Scores]:
    """Return how the adapter is in the merged weights, and the scores of base plus adapter."""
    model = load_adapter(load(base, number_type), adapter)
    applied = adapter_parity.compare(model, StoredWeights(merged))
    sum_in_float32(model)
    return applied, score(model, compared)


def _check_adapter(applied: adapter_parity.Applied, scale: tuple[float, float] | None) -> list[ParityCheck]:
    found = f"{applied.lowest:.3f} to {applied.highest:.3f} times, by module"
    if applied.wrong is not None:
        found += f", wrong in {applied.wrong}"
    off = f"{1 - applied.off:.4%} of the weights are the sum, in {applied.module or 'all'}"
    checks = [
        _check("merge: the adapter is applied once", applied.wrong is None, found, "1, but for rounding"),
        _check("merge: base plus adapter", applied.off <= _NOT_THE_SUM, off, f"at least {1 - _NOT_THE_SUM:.1%}"),
    ]
    if scale is not None:
        written, wanted = scale
        checks.append(_check("merge: scale", written == wanted, f"{written:g}", f"{wanted:g}, of the recipe"))
    return checks


def _at_most(name: str, differences: Differences, limit: float) -> ParityCheck:
    found = (
        f"{differences.mean:.4f} nats a token in the mean, {differences.largest:.3f} at most, "
        f"likeliest token the same in {differences.agreement:.1%}"
    )
    return _check(name, differences.mean <= limit, found, f"at most {limit:.3f} in the mean")


def _check(name: str, passed: bool, found: str, expected: str) -> ParityCheck:
    return ParityCheck(name=name, passed=passed, found=found, expected=expected)


def between(first: Scores, second: Scores) -> Differences:
    """How two scorings of the same examples differ, the second less the first."""
    pairs = [list(zip(one, other, strict=True)) for one, other in zip(first, second, strict=True)]
    same = [[one.likeliest == other.likeliest for one, other in example] for example in pairs]
    diverged = ((at, example.index(False)) for at, example in enumerate(same) if not all(example))
    return Differences(
        nats=tuple(tuple(other.logprob - one.logprob for one, other in example) for example in pairs),
        agreement=sum(map(sum, same)) / sum(map(len, same)),
        diverges_at=next(diverged, None),
    )
