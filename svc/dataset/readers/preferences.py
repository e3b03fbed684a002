"""Reads preference pairs and labeled answers from data files, for training with DPO, ORPO or KTO, and for checks."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.chat_formats import parse_row
from svc.dataset.readers.preference_formats import parse_labeled, parse_pair
from svc.dataset.readers.reader import (
    AnyExample,
    Kind,
    Line,
    OnRead,
    Source,
    open_file,
    read_good,
    require,
    wrong_kind,
)
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair


def read_any_lines(path: Path, on_read: OnRead) -> tuple[Kind, Iterator[Line[AnyExample]]]:
    """Return the kind of examples in a file, and an iterator over all of its lines.

    Args:
        on_read: called at intervals with the number of bytes of the file read so far.

    Raises:
        DataError: the file does not exist, or it cannot be opened.
    """
    file = open_file(path, None, on_read)
    match file.kind:
        case Kind.CHAT:
            return file.kind, file.lines(parse_row)
        case Kind.PAIRS:
            return file.kind, file.lines(parse_pair)
        case Kind.LABELED:
            return file.kind, file.lines(parse_labeled)


def read_pairs(
    sources: Source | Sequence[Source],
    *,
    minimum: int = 1,
    cache: Path | None = None,
    bad_lines: BadLines | None = None,
    kept_back: Sequence[ChatExample] = (),
) -> list[PreferencePair]:
    """Return all preference pairs from one or more sources, in order.

    Args:
        sources: files, folders, or hub datasets given as `hf:ORG/NAME`.
        minimum: minimum number of pairs required.
        cache: folder for files fetched from the hub.
        bad_lines: collects bad lines, or None to raise an error for the first bad line.
        kept_back: held-out examples; a line that repeats one of their prompts is bad.

    Raises:
        DataError: a line is bad (the error names it), a file does not contain pairs, or there are too few pairs.
    """
    pairs = list(read_good(_pair_lines, sources, cache, bad_lines, kept_back))
    require(minimum, pairs, "preference pair", sources)
    return pairs


def read_labeled(
    sources: Source | Sequence[Source],
    *,
    minimum: int = 1,
    cache: Path | None = None,
    bad_lines: BadLines | None = None,
    kept_back: Sequence[ChatExample] = (),
) -> list[LabeledAnswer]:
    """Return all labeled answers from one or more sources, in order. A pair has a desirable and an undesirable answer.

    Args:
        sources: files, folders, or hub datasets given as `hf:ORG/NAME`; each file has labeled answers or pairs.
        minimum: minimum number of answers required.
        cache: folder for files fetched from the hub.
        bad_lines: collects bad lines, or None to raise an error for the first bad line.
        kept_back: held-out examples; a line that repeats one of their prompts is bad.

    Raises:
        DataError: a line is bad (the error names it), a file contains neither labeled answers nor pairs, or there are
            too few answers.
    """
    rows = read_good(_labeled_lines, sources, cache, bad_lines, kept_back)
    answers = [answer for row in rows for answer in _labeled(row)]
    require(minimum, answers, "labeled answer", sources)
    return answers


def write_pairs(path: Path, pairs: Iterable[PreferencePair]) -> None:
    """Write pairs as UTF-8 JSONL: two conversations, `chosen` and `rejected`, that begin with the same prompt."""
    path.write_text("".join(json.dumps(pair_row(pair), ensure_ascii=False) + "\n" for pair in pairs), "utf-8")


def pair_row(pair: PreferencePair) -> dict[str, object]:
    """Return a pair in its JSONL form."""
    chosen, rejected = pair.chosen.as_dict(), pair.rejected.as_dict()
    tools = {"tools": chosen["tools"]} if "tools" in chosen else {}
    return {"chosen": chosen["messages"], "rejected": rejected["messages"], **tools}


def _pair_lines(path: Path) -> Iterator[Line[PreferencePair]]:
    file = open_file(path, Kind.PAIRS)
    if file.kind is not Kind.PAIRS:
        raise wrong_kind(path, file.kind, Kind.PAIRS)
    return file.lines(parse_pair)


def _labeled_lines(path: Path) -> Iterator[Line[LabeledAnswer | PreferencePair]]:
    file = open_file(path, Kind.LABELED)
    match file.kind:
        case Kind.PAIRS:
            return file.lines(parse_pair)
        case Kind.LABELED:
            return file.lines(parse_labeled)
        case Kind.CHAT:
            raise wrong_kind(path, file.kind, Kind.LABELED)


def _labeled(row: LabeledAnswer | PreferencePair) -> tuple[LabeledAnswer, ...]:
    if isinstance(row, LabeledAnswer):
        return (row,)
    return LabeledAnswer(row.chosen, desirable=True), LabeledAnswer(row.rejected, desirable=False)
