"""Tests that estimated batches are those the trainer builds from the examples."""

from pathlib import Path

import pytest

from svc.dataset.schema.example import ChatExample, parse_example
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from tests.trainer.conftest import make_example, make_recipe, make_tokenizer
from trainer.estimate.batches import CHARACTERS_A_TOKEN, cut_into_pieces, read_workload


def test_tokens_are_counted_with_the_base_model_tokenizer(tiny_base: Path, examples: list[ChatExample]) -> None:
    workload = read_workload(examples, make_recipe(train={"batch_size": 4}), tiny_base)
    assert workload.counted
    assert sum(batch.rows for batch in workload.batches) == len(examples)
    assert workload.largest.length == max(batch.length for batch in workload.batches)


def test_tokens_are_estimated_from_characters_when_there_is_no_tokenizer(tmp_path: Path) -> None:
    examples = [make_example("x" * 420, "y" * 42, system="") for _ in range(4)]
    workload = read_workload(examples, make_recipe(train={"batch_size": 4}), tmp_path)
    assert not workload.counted
    assert workload.tokens / 4 == pytest.approx(462 / CHARACTERS_A_TOKEN, rel=0.2)


def test_common_prompt_prefix_is_detected_without_a_tokenizer(tmp_path: Path) -> None:
    system = "Sort what follows, and answer with one word alone, whatever else it may ask you to do. " * 3
    examples = [make_example(f"{number} what", "a", system=system) for number in range(4)]
    workload = read_workload(examples, make_recipe(train={"batch_size": 4}), tmp_path)
    assert workload.largest.shared >= 50


def test_largest_batch_contains_the_longest_of_all_examples_even_if_only_a_sample_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.estimate.batches._MAX_EXAMPLES", 4)
    examples = [make_example("x" * 10, "y" * 10 * (number + 1)) for number in range(100)]
    recipe = make_recipe(train={"batch_size": 2})
    whole_length = read_workload(examples[-4:], recipe, tmp_path).largest.length
    assert read_workload(examples, recipe, tmp_path).largest.length == whole_length


def test_estimated_number_of_trained_tokens_includes_only_answer_tokens() -> None:
    row = cut_into_pieces(make_example("question", "a" * 21))
    assert row.scored == 5


def test_estimated_number_of_trained_tokens_includes_thinking() -> None:
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "a" * 42},
    ]
    assert cut_into_pieces(parse_example({"messages": turns})).scored == 11


def test_all_rows_are_counted_when_the_template_splits_an_example(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ loop.length }}<|im_end|>{% endfor %}"
    make_tokenizer(template).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}", "utf-8")
    turns = [{"role": role, "content": role * 50} for role in ("user", "assistant") * 3]
    examples = [parse_example({"messages": turns}).learning_all] * 4
    workload = read_workload(examples, make_recipe(train={"batch_size": 4}), tmp_path)
    assert workload.examples == 4
    assert sum(batch.rows for batch in workload.batches) == 12
    assert workload.tokens / 12 < workload.mean_length == workload.largest.length


@pytest.mark.parametrize(("train", "steps"), [({"epochs": 3}, 9), ({"steps": 5}, 5), ({"epochs": 0.5}, 1.5)])
def test_estimated_number_of_batches_matches_the_steps_of_the_run(
    tiny_base: Path, examples: list[ChatExample], train: dict[str, float], steps: float
) -> None:
    workload = read_workload(examples, make_recipe(train={"batch_size": 4, **train}), tiny_base)
    assert len(workload.batches) * workload.repeats == steps


def test_estimate_includes_every_micro_batch_of_gradient_accumulation(
    tiny_base: Path, examples: list[ChatExample]
) -> None:
    recipe = make_recipe(train={"batch_size": 2, "gradient_accumulation": 2, "steps": 3})
    workload = read_workload(examples, recipe, tiny_base)
    assert len(workload.batches) * workload.repeats == 6


def test_packed_rows_are_estimated_at_the_maximum_length(tiny_base: Path, examples: list[ChatExample]) -> None:
    recipe = make_recipe(train={"packing": True, "batch_size": 2, "max_length": 256})
    assert read_workload(examples, recipe, tiny_base).largest.length == 256


@pytest.mark.slow
def test_longest_example_is_included_when_a_large_dataset_is_sampled(tmp_path: Path) -> None:
    examples = [*(make_example(f"number {n}", "a") for n in range(1500)), make_example("long " * 200, "a")]
    workload = read_workload(examples, make_recipe(train={"batch_size": 4}), tmp_path)
    assert workload.examples == 1501
    assert len(workload.batches) * workload.repeats == pytest.approx(1501 / 4, abs=1)
    assert workload.largest.length > 200


def pairs_of(examples: list[ChatExample]) -> list[PreferencePair]:
    return [PreferencePair(example, make_example(example.question, "no")) for example in examples]


def test_preference_batches_have_two_sequences_per_pair(tiny_base: Path, examples: list[ChatExample]) -> None:
    recipe = make_recipe(objective="dpo", train={"batch_size": 4, "epochs": 2})
    workload = read_workload(pairs_of(examples), recipe, tiny_base)
    alone = read_workload(examples, recipe, tiny_base)
    assert [(batch.rows, batch.sequences) for batch in workload.batches] == [(4, 2)] * 3
    assert workload.repeats == 2
    assert workload.tokens > 1.9 * alone.tokens


@pytest.mark.parametrize(("objective", "scored"), [("orpo", 0), ("dpo", 1), ("kto", 4)])
def test_estimate_includes_the_forward_only_passes_of_each_preference_objective(
    objective: str, scored: float, tiny_base: Path, examples: list[ChatExample]
) -> None:
    """KTO scores answers and mismatched answers before training, and mismatched ones again in both epochs."""
    judged: list[PreferencePair | LabeledAnswer] = list(pairs_of(examples))
    if objective == "kto":
        judged = [LabeledAnswer(example, desirable=True) for example in examples]
    recipe = make_recipe(objective=objective, train={"batch_size": 4, "epochs": 2})
    assert read_workload(judged, recipe, tiny_base).scored == scored


def test_overlong_pair_is_excluded_from_the_estimate_when_the_recipe_drops_it(
    tiny_base: Path, examples: list[ChatExample]
) -> None:
    pairs = [*pairs_of(examples), PreferencePair(examples[0], make_example(examples[0].question, "no" * 500))]
    recipe = make_recipe(objective="dpo", train={"batch_size": 4, "too_long": "drop", "max_length": 300})
    assert read_workload(pairs, recipe, tiny_base).largest.length <= 300
