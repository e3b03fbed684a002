"""A version with a real held-out set and its live traffic as rows in a store, without an engine or MLflow."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import Engine as Store
from sqlalchemy import select, update

from svc.dataset.readers.reader import read_examples, write_examples
from svc.dataset.schema.example import ChatExample, Message, Role
from svc.drift_reference.drift_sample import DRIFT_SAMPLE_FILE
from svc.drift_reference.item import ItemMaker
from svc.drift_reference.reference import KeyedHash, Reference, read_reference
from svc.drift_reference.text_embedding import TEXT_SPACE_FILE, fit_text_space, save_text_space
from svc.engine.probes import Probe
from svc.errors import NotFoundError
from svc.evaluation.results import ExampleResult, write_results
from svc.redaction import Redactor
from svc.registry.files import record_files
from svc.registry.manifest import FormatRecord, write_manifest
from svc.registry.registry import HELDOUT_FILE, REFERENCE_FOLDER, Registry, results_file
from svc.store.drift_items import add_items
from svc.store.feedback import Feedback, Rating, keep_feedback
from svc.store.requests import RequestOutcome, RequestRecord, add_requests
from svc.store.tables import FeedbackRow, RequestRow
from svc.version import Format, Target, VersionId
from tests.docs.pages import ROOT
from tests.serving.versions import FACTS, AliasBook
from tests.svc.registry.manifests import make_manifest

TASK = ROOT / "examples" / "debian-triage"
STREAMS = ROOT / "benchmarks" / "drift"
NAME = "triage"
GOOD_SHARE = 4
"""Every fourth held-out answer is wrong, as in the example, so three of four are correct."""
NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)
MAX_TOKENS = 16
CUT = {"answer": '{"section": "net", "why": "it', "tokens": MAX_TOKENS, "finish_reason": "length"}


def target(number: int = 1, name: str = NAME) -> Target:
    """Return the target of a version."""
    return Target(VersionId(name, number), Format.GPTQ)


@cache
def prompts(grade: str) -> tuple[str, ...]:
    """Return the prompts of a stream: `none` for prompts like the held-out ones, or a grade of shift."""
    file = "in_distribution" if grade == "none" else "shifted"
    rows = [json.loads(line) for line in (STREAMS / f"{file}.jsonl").read_text("utf-8").splitlines()]
    return tuple(row["prompt"] for row in rows if row["grade"] == grade)


@cache
def text_space() -> bytes:
    """Return the text space file of the example's training prompts. It is cached, as fitting takes seconds."""
    examples = read_examples(TASK / "train.jsonl")
    space = fit_text_space([example.question for example in examples], [example.answer for example in examples])
    with TemporaryDirectory() as folder:
        save_text_space(file := Path(folder) / TEXT_SPACE_FILE, space)
        return file.read_bytes()


def register(
    registry: Registry,
    number: int = 1,
    *,
    name: str = NAME,
    space: bool = True,
    examples: int = 200,
    prompts: Sequence[str] = (),
    cut: bool = False,
    sample: Sequence[str] = (),
) -> None:
    """Register a version with the example's held-out set.

    Args:
        prompts: prompts that replace those of the example.
        cut: whether answers exceeded their limit, so that their JSON ends in the middle.
        sample: prompts of the version's drift sample; by default those of its held-out set.
    """
    folder = registry.folder(VersionId(name, number))
    (folder / REFERENCE_FOLDER).mkdir(parents=True)
    heldout = read_examples(TASK / HELDOUT_FILE)[:examples]
    if prompts:
        heldout = [_asking(heldout[place % len(heldout)], text) for place, text in enumerate(prompts)]
    write_examples(folder / HELDOUT_FILE, heldout)
    drawn = [_asking(heldout[place % len(heldout)], text) for place, text in enumerate(sample)] or heldout
    write_examples(folder / REFERENCE_FOLDER / DRIFT_SAMPLE_FILE, drawn)
    if space:
        (folder / REFERENCE_FOLDER / TEXT_SPACE_FILE).write_bytes(text_space())
        results = [result(example.answer, right=place % GOOD_SHARE > 0) for place, example in enumerate(heldout)]
        if cut:
            results = [one.model_copy(update=CUT) for one in results]
        write_results(folder / REFERENCE_FOLDER / results_file(Format.GPTQ), results)
    (folder / Format.GPTQ.value).mkdir()
    (folder / Format.GPTQ.value / "config.json").write_text("{}")
    probe = Probe(token_ids=(1, 2), start=1, logprobs=(-0.5,), tolerance=1e-3, engine=FACTS)
    formats = {Format.GPTQ: FormatRecord(files=record_files(folder, folder / Format.GPTQ), probes=(probe,))}
    write_manifest(folder, make_manifest(VersionId(name, number), folder, formats=formats))


def _asking(example: ChatExample, text: str) -> ChatExample:
    system, _, answer = example.messages
    return ChatExample((system, Message(Role.USER, text), answer))


def result(answer: str, *, right: bool) -> ExampleResult:
    """Return the version's result on an example."""
    text = answer if right else '{"section":"libs"}'
    return ExampleResult(
        answer=text,
        tokens=7,
        limit=MAX_TOKENS,
        finish_reason="stop",
        logprob=-0.1 if right else -0.9,
        nll=0.2,
        scored=1,
        hit=right,
    )


def open_registry(home: Path) -> Registry:
    """Return a registry that does not use MLflow."""
    return Registry(home / "models", AliasBook())


_references: dict[tuple[bytes, Format, object], Reference] = {}
"""References keyed by their files' content, format, and the method that reads results, which some tests replace."""


class Traffic:
    """Helper that adds requests with their features as a server would, one per minute.

    Attributes:
        asked: ids of the requests, in order.
    """

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry
        self._makers: dict[Target, ItemMaker | None] = {}
        self.asked: list[str] = []

    @property
    def now(self) -> datetime:
        """Return the start time of the last request."""
        return NOON + timedelta(minutes=len(self.asked))

    def ask(
        self,
        texts: Sequence[str],
        answers: Sequence[str] | None = None,
        *,
        name: str = NAME,
        number: int = 1,
        content: bool = True,
        features: bool = True,
        conversation: str | None = None,
        system: str | None = None,
        temperature: float | None = 0.0,
        tokens: int = 7,
        finish_reason: str = "stop",
        logprobs: Sequence[float] | None = None,
    ) -> list[str]:
        """Add one request per text and return the request ids.

        Args:
            content: whether to store the requests' texts.
            features: whether to store the requests' features.
            conversation: first question of the conversation to which all requests belong as turns.
        """
        turn = system if system is not None else system_prompt()
        records = []
        for place, text in enumerate(texts):
            self.asked.append(f"req-{len(self.asked)}")
            messages = [{"role": "system", "content": turn}, {"role": "user", "content": text}]
            if conversation is not None:
                before = [{"role": "user", "content": conversation}, {"role": "assistant", "content": "Go on."}]
                messages[1:1] = before
            records.append(
                RequestRecord(
                    request_id=self.asked[-1],
                    started_at=self.now,
                    model=name,
                    version=VersionId(name, number),
                    format=Format.GPTQ,
                    route="/v1/chat/completions",
                    status=200,
                    outcome=RequestOutcome.COMPLETE,
                    seconds=0.1,
                    finish_reason=finish_reason,
                    tokens_out=tokens,
                    temperature=temperature,
                    prompt=json.dumps(messages),
                    answer=answers[place] if answers else _ordinary(len(self.asked)),
                )
            )
        kept = records if content else [record._replace(prompt=None, answer=None) for record in records]
        add_requests(self._store, kept)
        if features and (maker := self._maker(target(number, name))):
            add_items(self._store, target(number, name), maker.make(records))
        return [record.request_id for record in records]

    def _maker(self, asked: Target) -> ItemMaker | None:
        """Return the feature extractor for a version's requests, or None if the version has no text space."""
        if asked not in self._makers:
            try:
                self._makers[asked] = ItemMaker(self._reference(asked))
            except NotFoundError:
                self._makers[asked] = None
        return self._makers[asked]

    def _reference(self, asked: Target) -> Reference:
        """Return a version's reference. It is read once for all versions with the same files, as this takes seconds."""
        folder = self._registry.folder(asked.version)
        files = [*folder.glob(HELDOUT_FILE), *sorted(folder.glob(f"{REFERENCE_FOLDER}/*"))]
        content = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).digest()
        key = content, asked.format, Registry.results
        if key not in _references:
            _references[key] = read_reference(self._registry, asked, Redactor(()))
        return replace(_references[key], hashes=KeyedHash.of_home(self._registry.models.parent))

    def rate(self, request_ids: Sequence[str], *, bad: int) -> None:
        """Rate answers at the current time, the first `bad` of them as bad."""
        for place, request_id in enumerate(request_ids):
            keep_feedback(self._store, request_id, Feedback(Rating.BAD if place < bad else Rating.GOOD))
        rated = select(RequestRow.id).where(RequestRow.request_id.in_(request_ids))
        with self._store.begin() as connection:
            connection.execute(update(FeedbackRow).where(FeedbackRow.request.in_(rated)).values(given_at=self.now))


@cache
def system_prompt() -> str:
    """Return the system prompt shared by all held-out prompts."""
    return read_examples(TASK / HELDOUT_FILE)[0].messages[0].content


@cache
def _held_answers() -> tuple[str, ...]:
    heldout = read_examples(TASK / HELDOUT_FILE)
    return tuple(result(e.answer, right=place % GOOD_SHARE > 0).answer for place, e in enumerate(heldout))


def _ordinary(place: int) -> str:
    """Return an answer that resembles the held-out answers."""
    return _held_answers()[place * 37 % len(_held_answers())]
