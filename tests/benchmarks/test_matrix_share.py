"""Tests that necessary operations follow the formula, for the real model and the trainer's own batches."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.matrix_share import Shape, needed_flops, read_shape
from svc.engine.device import NumberType
from tests.trainer.conftest import make_example, make_model, make_recipe
from trainer.data.chat_template import load_tokenizer, stop_tokens, tokenize_examples
from trainer.data.length_grouped_sampler import LengthGroupedSampler
from trainer.estimate.batches import Batch, plan_batches
from trainer.estimate.devices import measure_matrix_speed
from trainer.model.load import ModelForm, load_model
from trainer.model.peft_config import add_adapter

EXAMPLES = [make_example(f"number {'x' * number}", "red") for number in range(12)]
BATCH = Batch(rows=3, length=10, shared=4, answers=5)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


def test_flops_of_a_shared_prefix_are_counted_once() -> None:
    assert BATCH.computed == 4 + 3 * 6


def test_token_costs_four_flops_per_frozen_weight_and_six_per_trained_weight() -> None:
    assert needed_flops(Shape(linear=100, adapter=0, head=0, attention=0), BATCH) == 4 * 100 * 22
    assert needed_flops(Shape(linear=0, adapter=10, head=0, attention=0), BATCH) == 6 * 10 * 22


def test_output_head_flops_are_counted_only_for_answer_tokens() -> None:
    assert needed_flops(Shape(linear=0, adapter=0, head=1000, attention=0), BATCH) == 4 * 1000 * 5


def test_attention_flops_count_only_preceding_tokens() -> None:
    pairs = sum(range(1, 5)) + 3 * sum(range(5, 11))
    assert needed_flops(Shape(linear=0, adapter=0, head=0, attention=8), BATCH) == 12 * 8 * pairs


@pytest.mark.slow
def test_counted_flops_match_pytorch_flop_counter(tiny_base: Path) -> None:
    recipe = make_recipe()
    model = add_adapter(load_model(tiny_base, ModelForm(NumberType.FLOAT32)), recipe, 1)
    shape, tokens = read_shape(model), 24
    batch = Batch(rows=1, length=tokens, shared=0, answers=tokens)
    assert shape.attention == 2 * 64
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.arange(tokens).unsqueeze(dim=0), use_cache=False).logits.sum().backward()
    # PyTorch's counter omits attention on a CPU, and the gradient of the first layers' inputs is not needed.
    without_attention = needed_flops(Shape(shape.linear, shape.adapter, shape.head, 0), batch)
    assert counter.get_total_flops() == pytest.approx(without_attention, rel=0.1)


def test_batches_in_the_flop_count_match_the_trainers_batches(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    rows = tokenize_examples(tokenizer, EXAMPLES, stop_tokens(tiny_base, tokenizer), {})
    lengths = [len(row.input_ids) for row in rows]
    recipe = make_recipe(train={"batch_size": 5})
    order = list(LengthGroupedSampler(lengths, 5, recipe.train.seed))
    batches = plan_batches(rows, recipe.train)
    assert [batch.rows for batch in batches] == [5, 5, 2]
    assert [batch.length for batch in batches] == [
        max(lengths[index] for index in order[start : start + 5]) for start in (0, 5, 10)
    ]
    assert all(batch.shared > 16 for batch in batches)
    assert sum(batch.answers for batch in batches) == sum(end - start for row in rows for start, end in row.learnt)


def test_matmul_throughput_measurement_counts_flops_of_all_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr("trainer.estimate.devices.time.perf_counter", lambda: next(clock))
    assert measure_matrix_speed(4, 5, 6, NumberType.FLOAT32, repeats=3) == 3 * 2 * 4 * 5 * 6
