"""`svc feedback` writes users' feedback on answers as training data."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from serving.access.time_options import time_past
from svc.errors import NotFoundError
from svc.invocation import settings_of

if TYPE_CHECKING:
    from serving.feedback.training_rows import Unused
    from svc.dataset.schema.objective import Objective
    from svc.store.feedback import RatedText


@click.command()
@click.argument("model")
@click.option(
    "--objective",
    type=click.Choice(["sft", "dpo", "orpo", "kto"]),
    default="dpo",
    show_default=True,
    help="Objective of the recipe, which determines what is written: corrections for sft, pairs for dpo and orpo, "
    "answers with ratings for kto.",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="File to write.  [default: stdout]")
@click.option(
    "--since",
    type=time_past,
    metavar="TIME",
    help="Use only requests since this time: a date (UTC), or an age such as 30d.",
)
@click.pass_context
def feedback(ctx: click.Context, model: str, objective: str, output: Path | None, since: datetime | None) -> None:
    """Write feedback on the answers of MODEL (NAME or NAME@N) as lines of training data.

    A correction becomes the chosen answer of a pair, and the model's answer becomes the rejected answer. Only answers
    whose prompt and text are stored can be used.
    """
    from svc.dataset.schema.objective import Objective
    from svc.store.database import open_store
    from svc.store.feedback import read_rated_texts
    from svc.terminal import console
    from svc.version import VersionId

    version = VersionId.parse(model) if "@" in model else None
    name, number = (version.name, version.number) if version else (model, None)
    rated = read_rated_texts(open_store(settings_of(ctx)), name, number=number, since=since)
    unused = Counter["Unused"]()
    lines = _lines(rated, Objective(objective), unused)
    written, first = 0, next(lines, None)
    if first is not None:
        with nullcontext(sys.stdout) if output is None else _open(output) as file:
            for line in chain([first], lines):
                file.write(line)
                written += 1
    for reason, count in unused.most_common():
        console.print(f"rated answers not used: {count}; {reason}", markup=False)
    if not written:
        raise NotFoundError(
            f"no feedback on {model} can be used for the objective {objective}",
            expected="ratings or corrections of answers whose prompt and text are stored",
            todo="set request_log.content_share to store prompts and answers, and send feedback to /v1/feedback "
            "(docs/api.md)",
        )
    console.print(f"wrote {written} lines for objective: {objective}", markup=False)


def _open(path: Path) -> TextIO:
    """Open a file for writing. Only this user can read it, because it contains users' prompts and answers."""
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"cannot write {path}: {error.strerror}") from error
    os.chmod(path, 0o600)
    return file


def _lines(rated: "Iterable[RatedText]", objective: "Objective", unused: "Counter[Unused]") -> Iterator[str]:
    """Yield lines of training data. In `unused`, count the answers that provide no training data, by reason."""
    from serving.feedback.training_rows import Unused, training_rows

    for answer in rated:
        rows = training_rows(answer, objective)
        if isinstance(rows, Unused):
            unused[rows] += 1
        else:
            for row in rows:
                yield json.dumps({"request_id": answer.request_id, **row}, ensure_ascii=False) + "\n"
