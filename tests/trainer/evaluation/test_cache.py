"""Tests that a model's earlier answers are reused only for the same weights and conditions."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from svc.dataset.schema.example import ChatExample, parse_example
from svc.evaluation.results import ExampleResult
from tests.svc.chats import chat, turn
from trainer.evaluation.cache import EvaluationCache

EXAMPLES = [chat("a", "1"), chat("b", "2"), chat("c", "3")]
RESULTS = [
    ExampleResult(answer=answer, tokens=2, limit=16, finish_reason="stop", logprob=-0.5, nll=0.5, scored=1, hit=True)
    for answer in "123"
]


def find(cache: EvaluationCache, examples: Sequence[ChatExample], limit: int = 16) -> tuple[ExampleResult, ...] | None:
    return cache.find(examples, [limit] * len(examples))


@pytest.fixture
def cache(tmp_path: Path) -> EvaluationCache:
    cache = EvaluationCache(tmp_path / "cache", "sha256:1", "eager")
    cache.add(EXAMPLES, RESULTS)
    return cache


def test_cached_results_follow_the_order_of_the_examples(cache: EvaluationCache) -> None:
    assert find(cache, EXAMPLES[::-1]) == tuple(RESULTS[::-1])


def test_metric_scores_are_not_cached_with_answers(cache: EvaluationCache) -> None:
    scored = RESULTS[0].model_copy(update={"scores": {"accuracy": 1.0}})
    cache.add([chat("d", "4")], [scored])
    assert find(cache, [chat("d", "4")]) == (RESULTS[0],)


def test_evaluation_cache_returns_results_for_a_subset_of_examples(cache: EvaluationCache) -> None:
    assert find(cache, EXAMPLES[1:]) == tuple(RESULTS[1:])


def test_evaluation_cache_returns_none_when_one_example_is_missing(cache: EvaluationCache) -> None:
    assert find(cache, [*EXAMPLES, chat("d", "4")]) is None


def test_changing_the_reference_answer_causes_a_cache_miss(cache: EvaluationCache) -> None:
    assert find(cache, [chat("a", "2")]) is None


def test_cached_result_is_not_reused_when_tool_call_parsing_differs(cache: EvaluationCache) -> None:
    question, call = turn("user", "Rain?"), {"role": "assistant", "tool_calls": [{"function": {"name": "rain"}}]}
    text = parse_example({"messages": [question, turn("assistant", "yes")], "tools": [{"name": "rain"}]})
    calling = parse_example({"messages": [question, call], "tools": [{"name": "rain"}]})
    cache.add([text], RESULTS[:1])
    cache.add([calling], RESULTS[1:2])
    assert find(cache, [text]) == (RESULTS[0],)
    assert find(cache, [text, calling]) is None


def test_changing_the_answer_limit_causes_a_cache_miss(cache: EvaluationCache) -> None:
    assert find(cache, EXAMPLES, limit=8) is None
    shorter = [result.model_copy(update={"limit": 8}) for result in RESULTS]
    cache.add(EXAMPLES, shorter)
    assert find(cache, EXAMPLES, limit=8) == tuple(shorter)
    assert find(cache, EXAMPLES) == tuple(RESULTS)


def test_cache_lookup_combines_results_added_at_different_times(cache: EvaluationCache) -> None:
    cache.add([chat("d", "4")], RESULTS[:1])
    assert find(cache, [chat("d", "4"), *EXAMPLES]) == (RESULTS[0], *RESULTS)


@pytest.mark.parametrize("conditions", [("sha256:2", "eager"), ("sha256:1", "compiled"), ("sha256:1",)])
def test_different_weights_or_evaluation_conditions_cause_a_cache_miss(
    cache: EvaluationCache, tmp_path: Path, conditions: tuple[str, ...]
) -> None:
    assert find(EvaluationCache(tmp_path / "cache", *conditions), EXAMPLES) is None


def test_corrupt_evaluation_cache_file_is_ignored(cache: EvaluationCache, tmp_path: Path) -> None:
    [path] = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert find(cache, EXAMPLES) is None
    cache.add(EXAMPLES, RESULTS)
    assert find(cache, EXAMPLES) == tuple(RESULTS)
