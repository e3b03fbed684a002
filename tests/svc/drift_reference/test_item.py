"""Tests that items of live requests have the features of reference prompts and answers, and no text."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svc.dataset.schema.tool_calls import ToolCall, answer_text
from svc.drift_reference.answer import AnswerFeature, AnswerSampler, ComparedAnswer
from svc.drift_reference.item import ItemMaker, answer_sample, prompt_sample
from svc.drift_reference.prompt import Prompt, PromptSampler
from svc.drift_reference.reference import KeyedHash, Reference, read_prompt, read_reference
from svc.drift_reference.sample import NO, Sample
from svc.drift_reference.text_embedding import fit_text_space
from svc.errors import NotFoundError
from svc.redaction import Redactor
from svc.store.drift_items import Item, add_items, read_items
from svc.store.requests import RequestOutcome, RequestRecord, add_requests
from svc.version import Format
from tests.monitoring.drift.traffic import open_registry, register, target
from tests.new_store import new_store

TEXTS = ["Where is my parcel?", "When does the parcel come?", "I want my money back", "The parcel is broken"]
RECORD = RequestRecord(
    request_id="req-1",
    started_at=datetime(2026, 1, 2, tzinfo=UTC),
    model="triage",
    version=target().version,
    format=Format.GPTQ,
    route="/v1/chat/completions",
    status=200,
    outcome=RequestOutcome.COMPLETE,
    seconds=0.1,
    finish_reason="stop",
    tokens_out=3,
    temperature=0.0,
    prompt="[]",
    answer="place",
)
LABELS = ["place", "time", "money"] * 4

prompt_sampler = PromptSampler(fit_text_space(TEXTS, ["place", "time", "money", "money"]))
answer_sampler = AnswerSampler(LABELS, cut=16)
REFERENCE = Reference(
    prompt_sampler,
    answer_sampler,
    prompt_sampler.sample([Prompt(text) for text in TEXTS]),
    answer_sampler.sample([ComparedAnswer(label, 3, "stop", -0.1, greedy=True) for label in LABELS]),
    missing="",
    words=[],
    hashes=KeyedHash(bytes(16)),
)
maker = ItemMaker(REFERENCE)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=30)}
    ),
    max_size=4,
)
answers = st.builds(
    RECORD._replace,
    prompt=turns.map(json.dumps) | st.text(max_size=30).map(json.dumps),
    answer=st.text(max_size=20) | st.sampled_from([*LABELS, "", "I am sorry, I can't help", "[1]"]),
    tokens_out=st.integers(0, 40),
    finish_reason=st.none() | st.sampled_from(["stop", "length", "tool_calls"]),
    temperature=st.none() | st.sampled_from([0.0, 0.7]),
    max_tokens=st.none() | st.sampled_from([5, 16, 99]),
)


def chat(*contents: str, system: str = "You sort parcels.") -> RequestRecord:
    """Return a request with these turns, beginning with a user turn."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return RECORD._replace(prompt=json.dumps([{"role": "system", "content": system}, *messages]))


def make(record: RequestRecord) -> Item:
    (item,) = maker.make([record])
    return item


def same(one: Sample, other: Sample) -> None:
    assert one.size == other.size
    assert (one.numbers.keys(), one.categories.keys()) == (other.numbers.keys(), other.categories.keys())
    for name, values in one.numbers.items():
        assert np.array_equal(values, other.numbers[name], equal_nan=True), name
    for name, names in one.categories.items():
        assert names.tolist() == other.categories[name].tolist()
    for view, another in zip(one.views, other.views, strict=True):
        assert view.tolist() == another.tolist()


@pytest.mark.slow
@settings(max_examples=25)
@given(st.lists(answers, min_size=1, max_size=3), st.none() | st.floats(-9, 0))
def test_drift_items_yield_the_same_samples_as_the_full_request_and_answer_texts(
    records: list[RequestRecord], logprob: float | None
) -> None:
    items = maker.make(records)
    assert REFERENCE.prompts is not None and REFERENCE.answers is not None
    same(prompt_sample(items, REFERENCE.prompts), REFERENCE.prompt_sampler.sample([*map(_prompt, records)]))  # type: ignore[union-attr]
    told = [ComparedAnswer(r.answer, r.tokens_out, r.finish_reason, logprob, _greedy(r)) for r in records]
    same(answer_sample(items, [logprob] * len(items), REFERENCE.answers), answer_sampler.sample(told))


def test_tool_call_is_counted_neither_as_a_json_answer_nor_as_an_empty_answer() -> None:
    call = answer_text("", [ToolCall("rain", "{}")])
    sample = AnswerSampler([call] * 12, cut=16).sample([ComparedAnswer(call, 9, "tool_calls", None, greedy=True)])
    assert AnswerFeature.VALID_JSON not in sample.categories
    assert sample.categories[AnswerFeature.EMPTY].tolist() == [NO]
    assert sample.categories[AnswerFeature.LABEL].tolist() == [call]


def _prompt(record: RequestRecord) -> Prompt:
    return read_prompt(record.prompt or "")


def _greedy(record: RequestRecord) -> bool:
    return record.temperature == 0 and (record.max_tokens is None or record.max_tokens >= answer_sampler.cut)


def test_drift_items_yield_the_same_samples_after_a_round_trip_through_the_store(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    records = [chat(text)._replace(request_id=text) for text in TEXTS]
    add_requests(store, records)
    items = maker.make(records)
    add_items(store, target(), items)
    stored = [found.item for found in read_items(store, target(), after=0, newest=9)]
    assert REFERENCE.prompts is not None and REFERENCE.answers is not None
    same(prompt_sample(stored, REFERENCE.prompts), prompt_sample(items, REFERENCE.prompts))
    none = [None] * len(items)
    same(answer_sample(stored, none, REFERENCE.answers), answer_sample(items, none, REFERENCE.answers))


def test_feature_absent_from_a_drift_item_counts_as_missing() -> None:
    like = Sample(0, {"new": np.zeros(0)}, {"newer": np.array([], dtype=np.str_)}, (np.zeros((0, 4)), np.zeros((0, 3))))
    found = answer_sample(maker.make([chat("a")]), [None], like)
    assert np.isnan(found.numbers["new"]).all()
    assert found.categories["newer"].tolist() == [""]


def test_empty_list_of_drift_items_yields_an_empty_sample() -> None:
    assert REFERENCE.prompts is not None
    empty = prompt_sample([], REFERENCE.prompts)
    assert empty.size == 0
    same(empty.followed_by(REFERENCE.prompts), REFERENCE.prompts)


def test_only_turns_of_the_same_conversation_share_a_conversation_hash() -> None:
    first, second = make(chat("Where is it?")), make(chat("Where is it?", "Here.", "Thanks!"))
    assert first.conversation == second.conversation
    others = [chat("Where is she?"), chat("Where is it?", system=""), chat("Thanks!")]
    assert len({first.conversation, *(make(other).conversation for other in others)}) == 4


def test_plain_completion_counts_as_a_separate_conversation() -> None:
    one, same_one, other = (make(RECORD._replace(prompt=json.dumps(text))) for text in ("a", "a", "b"))
    assert one.conversation == same_one.conversation != other.conversation


def test_drift_item_words_come_from_the_last_user_turn() -> None:
    assert make(chat("elephant", "no", "my parcel")).words.tolist() == REFERENCE.hashes.words("parcel my").tolist()


def test_answer_has_no_log_probability_until_it_is_scored() -> None:
    assert AnswerFeature.LOGPROB not in make(chat("a")).answer


def test_drift_items_cannot_be_created_for_a_version_without_a_drift_reference() -> None:
    with pytest.raises(NotFoundError, match="adapter"):
        ItemMaker(Reference(None, None, None, None, "an adapter", [], REFERENCE.hashes))


@pytest.mark.slow
def test_drift_reference_contains_the_words_of_its_prompts(tmp_path: Path) -> None:
    registry = open_registry(tmp_path)
    register(registry, examples=20)
    reference = read_reference(registry, target(), Redactor())
    assert reference.prompts is not None
    assert len(reference.words) == reference.prompts.size > 0
    assert all(len(words) for words in reference.words)
    assert reference.hashes == KeyedHash.of_home(tmp_path)
    assert read_reference(registry, target(), Redactor()).words[0].tolist() == reference.words[0].tolist()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-32-le"])
def test_database_contains_no_request_text(tmp_path: Path, encoding: str) -> None:
    store = new_store(tmp_path)
    record = chat("Featherstonehaugh lost Cholmondeley", "Marjoribanks", "Where is Featherstonehaugh?")
    record = record._replace(answer="Beauchamp")
    add_requests(store, [record._replace(prompt=None, answer=None)])
    assert add_items(store, target(), maker.make([record])) == 1
    content = b"".join(path.read_bytes() for path in tmp_path.glob("svc.db*")).lower()
    words = ("featherstonehaugh", "cholmondeley", "marjoribanks", "beauchamp", "parcels")
    assert [word for word in words if word.encode(encoding) in content] == []


def test_label_after_thinking_is_recognized() -> None:
    thought, plain = (
        ComparedAnswer(text, 3, "stop", -0.1, greedy=True) for text in ("<think>a</think>\n\nplace", "place")
    )
    assert answer_sampler.sample([thought]).categories == answer_sampler.sample([plain]).categories
