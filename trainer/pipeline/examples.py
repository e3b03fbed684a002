"""The examples of a run: what is trained on, and what the version is judged by."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from svc.dataset.checks.check import shared_prompts
from svc.dataset.fingerprint import fingerprint
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.split import mix_general, near_leaks, split_heldout
from svc.errors import DataError
from svc.terminal import console
from trainer.recipe.sections import Data, Recipe


@dataclass(frozen=True, slots=True)
class Examples:
    """What is trained on and judged by, and their fingerprints.

    Attributes:
        train: the task's examples, then the general ones.
        general: how many of `train`, at its end, are general.
    """

    train: tuple[ChatExample, ...]
    heldout: tuple[ChatExample, ...]
    train_fingerprint: str
    heldout_fingerprint: str
    general: int = 0


def read_run_examples(recipe: Recipe, *, cache: Path | None = None, bad_lines: BadLines | None = None) -> Examples:
    """Reads a recipe's data.

    Args:
        cache: folder for datasets of the hub.
        bad_lines: takes lines that cannot be trained on, leaks among them; without it the first one stops the run.

    Raises:
        DataError: a file that cannot be trained on; names file and line.
    """
    data = recipe.data
    read = partial(read_examples, cache=cache, bad_lines=bad_lines)
    heldout = read(data.heldout) if data.heldout else []
    readable = read(data.train, minimum=2 if heldout else 3, kept_back=heldout if bad_lines else ())
    if not heldout:
        readable, heldout = split_heldout(readable, data.heldout_share, data.seed)
    train = readable[data.skip :][: data.limit]
    if len(train) < 2:
        raise DataError(
            f"data.skip {data.skip} leaves {len(train)} of {len(readable)} examples in {', '.join(data.train)}",
            expected="at least 2",
            todo="lower data.skip",
        )
    _refuse_leaks(data, train, heldout)
    general = mix_general(train, read(data.general), heldout, data.general_share, data.seed) if data.general else []
    whole = (*train, *general)
    return Examples(whole, tuple(heldout), fingerprint(whole), fingerprint(heldout), len(general))


def _refuse_leaks(data: Data, train: list[ChatExample], heldout: list[ChatExample]) -> None:
    """Examples that are held out stop a run; examples that are nearly held out are told."""
    check = f"svc data check {' '.join(data.train)} --heldout {' '.join(data.heldout or ())}"
    leaked = shared_prompts(train, heldout)
    if leaked:
        raise DataError(
            f"{len(leaked)} training examples have the prompt of a held-out one, the first is number {leaked[0] + 1}",
            expected="a held-out set that is never trained on: else its figures mean nothing",
            todo=f"{check}, and drop those lines; or train with --skip-bad",
        )
    if data.heldout and (near := near_leaks(train, heldout)):
        console.print(f"[yellow]{len(near)} training examples ask nearly the same as a held-out one: {check}[/yellow]")
