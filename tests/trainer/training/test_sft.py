"""Tests training: learned tokens, rejected data, and that the cheap loss equals the full loss."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainingArguments,
    set_seed,
)

from svc.dataset.schema.example import ChatExample, parse_example
from svc.engine.device import NumberType
from svc.errors import BaseModelError, DataError, TrainingError
from svc.training_progress import HeldoutLoss, ProgressFile, ProgressReader, StepDone
from tests.trainer.conftest import CHAT_TEMPLATE, losses_of, make_example, make_model, make_recipe, make_tokenizer
from trainer.data.chat_template import (
    IGNORED,
    load_tokenizer,
    stop_tokens,
    tokenize_examples,
    tokenize_turns,
    training_row,
)
from trainer.model.acceleration import Facts, choose_acceleration
from trainer.training.arguments import training_arguments
from trainer.training.loss import answer_loss
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary

pytestmark = pytest.mark.slow

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LLAMA = LlamaForCausalLM(LlamaConfig(**SHAPE)).float()


def train(base: Path, examples: list[ChatExample], out: Path, **section: float) -> TrainingSummary:
    recipe = make_recipe(train={"batch_size": 4, **section})
    return train_model(
        base, TrainingData(examples), recipe, out, out.with_name("checkpoints"), number_type=NumberType.BFLOAT16
    )


@pytest.fixture(scope="module")
def trained(tiny_base: Path, examples: list[ChatExample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "adapter"
    train(tiny_base, examples, out)
    return out


def test_each_step_is_written_to_the_progress_file_with_loss_and_token_accuracy(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    recipe = make_recipe(train={"batch_size": 4, "epochs": 4}, stopping={"every_steps": 4, "keep_best": True})
    data, progress = TrainingData(examples, examples[:4]), tmp_path / "progress"
    summary = train_model(
        tiny_base,
        data,
        recipe,
        tmp_path / "adapter",
        tmp_path / "checkpoints",
        number_type=NumberType.FLOAT32,
        progress=ProgressFile(progress),
    )
    records = ProgressReader(progress).read()
    steps = [record for record in records if isinstance(record, StepDone)]
    heldout = {record.step: record.loss for record in records if isinstance(record, HeldoutLoss)}
    assert [(record.step, record.loss) for record in steps] == [
        (point.step, point.loss) for point in summary.points if point.loss is not None
    ]
    assert heldout == {point.step: point.heldout_loss for point in summary.points if point.heldout_loss is not None}
    assert {record.steps for record in steps} == {summary.steps}
    assert (steps[-1].tokens, steps[-1].left_s, steps[-1].epoch) == (summary.tokens, 0.0, 4.0)
    accuracies = [record.accuracy for record in steps if record.accuracy is not None]
    assert len(accuracies) == len(steps)
    assert 0 <= accuracies[0] < accuracies[-1] <= 1


def test_token_accuracy_is_the_share_of_answer_tokens_with_the_largest_logit() -> None:
    input_ids = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, :5] = IGNORED
    top1 = LLAMA(input_ids=input_ids).logits.argmax(dim=-1)
    labels[:, 6] = top1[:, 5]
    correct: list[torch.Tensor] = []
    answer_loss(LLAMA, input_ids, labels, correct=correct)
    assert sum(int(part) for part in correct) == int((top1[:, 4:-1] == labels[:, 5:]).sum()) >= 3


def test_adapter_is_written_with_its_tokenizer(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names


def test_training_writes_no_pickle_files(trained: Path) -> None:
    assert not [path.name for path in trained.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_every_linear_layer_except_the_output_head_is_trained(trained: Path) -> None:
    high = {
        name: weight for name, weight in load_file(trained / "adapter_model.safetensors").items() if "lora_B" in name
    }
    assert len(high) == 2 * 7
    assert all(weight.any() for weight in high.values())


def test_adapters_trained_with_the_same_seed_are_equal(
    tiny_base: Path, examples: list[ChatExample], trained: Path, tmp_path: Path
) -> None:
    train(tiny_base, examples, tmp_path / "again")
    files = [folder / "adapter_model.safetensors" for folder in (trained, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_adapters_trained_with_different_seeds_differ(
    tiny_base: Path, examples: list[ChatExample], trained: Path, tmp_path: Path
) -> None:
    train(tiny_base, examples, tmp_path / "other", seed=1)
    files = [folder / "adapter_model.safetensors" for folder in (trained, tmp_path / "other")]
    assert files[0].read_bytes() != files[1].read_bytes()


def heldout_losses(summary: TrainingSummary) -> dict[int, float]:
    """Return the held-out losses of the trained weights, keyed by step."""
    points = (point for point in summary.points if point.step > 0)
    return {point.step: point.heldout_loss for point in points if point.heldout_loss is not None}


def test_training_loss_falls_during_a_run(tiny_base: Path, examples: list[ChatExample], tmp_path: Path) -> None:
    losses = losses_of(train(tiny_base, examples, tmp_path / "adapter", learning_rate=1e-2, epochs=4))
    assert losses[-1] < losses[0] - 0.5


def test_training_summary_has_the_number_of_steps_and_tokens(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    summary = train(tiny_base, examples, tmp_path / "adapter", epochs=2)
    tokenizer = load_tokenizer(tiny_base)
    rows = tokenize_examples(tokenizer, examples, stop_tokens(tiny_base, tokenizer), {})
    assert (summary.steps, summary.tokens) == (6, 2 * sum(len(row.input_ids) for row in rows))


def test_repeated_run_reuses_tokenized_examples(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(tiny_base, examples, tmp_path / "adapter")
    monkeypatch.setattr("trainer.training.sft.iterate_turns", lambda *arguments: iter([]))
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    assert losses_of(train(tiny_base, examples, tmp_path / "adapter")) == losses_of(first)


def test_too_long_examples_are_counted_and_rejected_before_training(tiny_base: Path, tmp_path: Path) -> None:
    examples = [make_example("short", "red"), make_example("long" * 100, "red"), make_example("longer" * 100, "red")]
    with pytest.raises(
        DataError, match=r"2 of 3 examples are longer than 300 tokens; the longest, example 3, has 660 tokens"
    ):
        train(tiny_base, examples, tmp_path / "adapter", max_length=300)


def test_non_finite_loss_error_suggests_a_lower_learning_rate(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="the loss is nan") as caught:
        train(tiny_base, examples, tmp_path / "adapter", learning_rate=1e30, epochs=2)
    assert "lower train.learning_rate" in caught.value.todo


def test_base_without_a_chat_template_is_rejected(tmp_path: Path, examples: list[ChatExample]) -> None:
    make_tokenizer(chat_template="").save_pretrained(tmp_path / "base")
    with pytest.raises(BaseModelError, match="no chat template"):
        train(tmp_path / "base", examples, tmp_path / "adapter")


def test_training_labels_include_the_answer_and_its_end_token() -> None:
    tokenizer = make_tokenizer()
    (example,) = tokenize_examples(tokenizer, [make_example("which?", "red")], {tokenizer.eos_token_id}, {})
    row = training_row(example)
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt) == "red<|im_end|>"


def learnt_rows(messages: list[dict[str, Any]], template: str = CHAT_TEMPLATE) -> list[list[str]]:
    """Return the learned texts of each row."""
    tokenizer = make_tokenizer(template)
    example = parse_example({"messages": messages})
    [rows] = tokenize_turns(tokenizer, [example], {tokenizer.eos_token_id}, {})
    for row in rows:
        labels = training_row(row)["labels"]
        assert all(label in (IGNORED, token) for label, token in zip(labels, row.input_ids, strict=True))
    return [[tokenizer.decode(row.input_ids[start:end]) for start, end in row.learnt] for row in rows]


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "3"},
]


@pytest.mark.parametrize(
    ("weights", "learnt"),
    [
        ({}, ["3"]),
        ({1: 0}, ["2", "3"]),
        ({1: 1, 3: 0, 5: 1}, ["1", "3"]),
        ({5: 0}, ["1", "2"]),
    ],
)
def test_message_weights_determine_which_answers_are_trained_on(weights: dict[int, int], learnt: list[str]) -> None:
    turns = [turn | ({"weight": weights[place]} if place in weights else {}) for place, turn in enumerate(CONVERSATION)]
    assert learnt_rows(turns) == [[f"{answer}<|im_end|>" for answer in learnt]]


def test_each_answer_becomes_a_separate_training_row_if_the_template_rewrites_earlier_answers() -> None:
    template = (
        "{% for message in messages %}<|im_start|>"
        "{% if message['role'] == 'assistant' %}:{% if not loop.last %}before: {% endif %}{% endif %}"
        "{{ message['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>:{% endif %}"
    )
    turns = [turn | {"weight": 1} if turn["role"] == "assistant" else turn for turn in CONVERSATION]
    assert learnt_rows(turns, template) == [[f"{answer}<|im_end|>"] for answer in "123"]


def test_every_row_counts_toward_the_training_steps_if_the_template_rewrites_earlier_answers(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] }}{{ loop.length }}")
    base = make_model(tmp_path / "base")
    make_tokenizer(template).save_pretrained(base)
    turns = [turn | {"weight": 1} if turn["role"] == "assistant" else turn for turn in CONVERSATION]
    examples = [parse_example({"messages": turns})] * 2
    assert train(base, examples, tmp_path / "adapter", batch_size=2, epochs=1).steps == 3


def test_template_receives_tools_and_their_arguments_as_objects() -> None:
    template = (
        "{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}{% for message in messages %}"
        "{% for call in message['tool_calls'] or [] %}{{ call['function']['arguments']['city'] }}{% endfor %}"
        "{{ message['content'] }}<|im_end|>{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sun", "tool_call_id": "1"},
        {"role": "assistant", "content": "It shines."},
    ]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    tokenizer = make_tokenizer(template)
    example = parse_example({"messages": messages, "tools": [tool]})
    (row,) = tokenize_examples(tokenizer, [example], {tokenizer.eos_token_id}, {})
    text = tokenizer.decode(row.input_ids)
    assert text == "weather weather?<|im_end|>Rome<|im_end|>sun<|im_end|>It shines.<|im_end|>"


def test_end_token_is_added_if_the_template_omits_it() -> None:
    tokenizer = make_tokenizer("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    (example,) = tokenize_examples(tokenizer, [make_example("which?", "red")], {tokenizer.eos_token_id}, {})
    row = training_row(example)
    assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{% for tool in tools %}{{ tool }}{% endfor %}", "'NoneType' object is not iterable"),
    ],
    ids=["turns", "no tools"],
)
def test_example_rejected_by_the_template_is_named_in_the_error(template: str, why: str) -> None:
    tokenizer = make_tokenizer(template)
    with pytest.raises(DataError, match=f"rejects example 1: {why}"):
        tokenize_examples(tokenizer, [make_example("which?", "red")], {tokenizer.eos_token_id}, {})


def test_stop_tokens_include_the_end_tokens_of_the_generation_config(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}', "utf-8")
    tokenizer = make_tokenizer()
    assert stop_tokens(tmp_path, tokenizer) == {5, 7, tokenizer.eos_token_id}


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw right-padded rows with a common prefix, each of which ends with an answer."""
    tokens = st.integers(0, 49)
    prefix = draw(st.lists(tokens, max_size=24))
    row = st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, min_size=1, max_size=4))
    rows = draw(st.lists(row, min_size=1, max_size=4))
    length = max(len(prefix) + len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), IGNORED)
    for number, (prompt, answer) in enumerate(rows):
        whole, start = torch.tensor([*prefix, *prompt, *answer]), len(prefix) + len(prompt)
        ids[number, : len(whole)] = whole
        labels[number, start : len(whole)] = whole[start:]
    return ids, labels


def whole_loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the textbook loss, with logits at every position and padding masked only by the labels."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradient(loss: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


@settings(max_examples=15, deadline=None)
@given(batches())
def test_computing_logits_only_for_answer_tokens_does_not_change_the_loss(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    torch.testing.assert_close(answer_loss(LLAMA, *batch), whole_loss(LLAMA, *batch), rtol=1e-4, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(batches())
def test_answer_only_loss_has_the_gradient_of_the_full_loss(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    cheap, real = (gradient(loss(LLAMA, *batch), LLAMA) for loss in (answer_loss, whole_loss))
    torch.testing.assert_close(cheap, real, rtol=1e-3, atol=1e-4)


@settings(max_examples=5, deadline=None)
@given(batches())
def test_computing_logits_only_for_answer_tokens_does_not_change_the_loss_of_a_gemma2_model(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    set_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=4, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    torch.testing.assert_close(answer_loss(model, *batch), whole_loss(model, *batch), rtol=1e-4, atol=1e-4)


def test_saved_best_weights_equal_the_weights_of_a_run_that_ends_at_the_best_step(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    """At a constant learning rate, a run that ends at that step has the same weights."""
    data = TrainingData(examples, [make_example(f"number {letter}", "blue") for letter in "abc"])
    steady = {"batch_size": 4, "learning_rate": 0.05, "schedule": "constant", "warmup_ratio": 0}
    recipe = make_recipe(train=steady | {"steps": 30}, stopping={"every_steps": 1, "keep_best": True})
    summary = train_model(
        tiny_base, data, recipe, tmp_path / "best", tmp_path / "checkpoints", number_type=NumberType.BFLOAT16
    )
    assert summary.best_step is not None
    assert summary.best_step < summary.steps == 30
    losses = heldout_losses(summary)
    assert min(losses, key=lambda step: losses[step]) == summary.best_step
    shorter = make_recipe(train=steady | {"steps": summary.best_step})
    train_model(
        tiny_base, data, shorter, tmp_path / "shorter", tmp_path / "other-checkpoints", number_type=NumberType.BFLOAT16
    )
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("best", "shorter")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_run_stops_when_heldout_loss_no_longer_falls(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    data = TrainingData(examples, [make_example(f"number {letter}", "blue") for letter in "abc"])
    train = {"batch_size": 4, "learning_rate": 0.05, "steps": 200}
    recipe = make_recipe(train=train, stopping={"every_steps": 1, "patience": 3})
    summary = train_model(
        tiny_base, data, recipe, tmp_path / "adapter", tmp_path / "checkpoints", number_type=NumberType.BFLOAT16
    )
    losses = heldout_losses(summary)
    best = min(losses, key=lambda step: losses[step])
    assert summary.steps == best + 3 < 200


def test_measuring_the_heldout_curve_does_not_change_the_weights(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    data = TrainingData(examples, [make_example(f"number {letter}", "blue") for letter in "abc"])
    curves = {}
    for curve in (True, False):
        recipe = make_recipe(train={"batch_size": 12, "steps": 30, "learning_rate": 1e-2}, stopping={"curve": curve})
        out = tmp_path / f"{curve}"
        curves[curve] = train_model(
            tiny_base, data, recipe, out, tmp_path / f"{curve}-checkpoints", number_type=NumberType.BFLOAT16
        ).points
    measured = {point.step: point for point in curves[True] if point.heldout_loss is not None}
    assert list(measured) == [0, 15, 30]
    assert measured[30].heldout_loss == pytest.approx(sum(measured[30].heldout_each) / 3)  # all have five tokens
    assert [point.step for point in curves[False]] == list(range(1, 31))
    assert all(point.heldout_loss is None for point in curves[False])
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("True", "False")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_training_curve_contains_the_loss_and_gradient_norm_and_speed_of_every_step(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    first, second, third = train(tiny_base, examples, tmp_path / "adapter", learning_rate=1e-2).points
    assert [first.epoch, second.epoch, third.epoch] == pytest.approx([1 / 3, 2 / 3, 1])
    assert first.learning_rate == 1e-2
    assert third.learning_rate == pytest.approx(1e-2 / 3)
    for point in (first, second, third):
        assert point.grad_norm
        assert point.tokens_per_second
        assert point.loss


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_follows_the_schedule_from_warmup_to_end(
    schedule: str, tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    rates: dict[int, float] = {}
    train = {"batch_size": 4, "steps": 20, "learning_rate": 1e-3, "warmup_ratio": 0.25, "schedule": schedule}
    train_model(
        tiny_base,
        TrainingData(examples),
        make_recipe(train=train),
        tmp_path / "adapter",
        tmp_path / "checkpoints",
        lambda step, figures: rates.update({step: figures["learning_rate"]}),
        number_type=NumberType.BFLOAT16,
    )
    assert rates[1] < rates[3] < rates[6] == pytest.approx(1e-3)
    assert rates[20] == pytest.approx(1e-3) if schedule == "constant" else rates[20] < 1e-4


def test_gradient_accumulation_gives_the_same_weights_as_one_large_batch(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    """The steps are equal up to rounding, because sums are computed in a different order."""
    curves = []
    for batch, accumulation in ((4, 1), (2, 2)):
        out = tmp_path / str(batch) / "adapter"
        curves.append(
            train(tiny_base, examples, out, batch_size=batch, gradient_accumulation=accumulation, learning_rate=1e-2)
        )
    losses = [losses_of(summary) for summary in curves]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_packing_trains_on_the_same_tokens_in_fewer_steps(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    apart = train(tiny_base, examples, tmp_path / "a" / "adapter", batch_size=1, epochs=2)
    packed = train(tiny_base, examples, tmp_path / "b" / "adapter", batch_size=1, epochs=2, packing=True)
    assert packed.tokens == apart.tokens
    assert packed.steps < apart.steps / 4


def test_heldout_loss_is_measured_when_packing_is_enabled(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    recipe = make_recipe(
        train={"packing": True, "max_length": 128, "batch_size": 2}, stopping={"every_steps": 1}, adapter={"rank": 4}
    )
    data = TrainingData(examples, examples[:4])
    packed = train_model(
        tiny_base, data, recipe, tmp_path / "adapter", tmp_path / "checkpoints", number_type=NumberType.BFLOAT16
    )
    assert all(0 < loss < 10 for loss in heldout_losses(packed).values())
    assert heldout_losses(packed)


def test_run_with_a_single_step_changes_the_weights(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    recipe = make_recipe(train={"batch_size": len(examples)})
    assert (
        train_model(
            tiny_base,
            TrainingData(examples),
            recipe,
            tmp_path / "adapter",
            tmp_path / "c",
            number_type=NumberType.BFLOAT16,
        ).steps
        == 1
    )
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)


def test_second_visible_gpu_does_not_change_the_number_of_training_steps(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = vars(TrainingArguments)["_setup_devices"].func

    def two_devices(arguments: TrainingArguments) -> torch.device:
        device: torch.device = original(arguments)
        arguments._n_gpu = 2
        return device

    replaced = cached_property(two_devices)
    replaced.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", replaced)
    assert train(tiny_base, examples, tmp_path / "adapter").steps == 3


def test_complete_examples_are_passed_to_the_model_when_neftune_noise_is_enabled(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise is scaled by the length of the model's input, which must be the complete example."""
    lengths = []
    original = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    train(tiny_base, examples, tmp_path / "adapter", neftune_alpha=5.0)
    shortest = min(len(row.input_ids) for row in tokenize_examples(make_tokenizer(), examples, {256}, {}))
    assert min(length for length in lengths if length > 1) >= shortest


def test_packed_examples_do_not_attend_to_each_other_in_a_mixture_of_experts(
    examples: list[ChatExample], tmp_path: Path
) -> None:
    """An MoE model uses TRL's loss, which adds the router's loss. Here the router's loss has weight 0."""
    tokenizer, shape = make_tokenizer(), SHAPE | {"vocab_size": len(make_tokenizer())}
    router = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.5,
        "moe_intermediate_size": 16,
        "router_aux_loss_coef": 1e-9,
    }
    set_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **router)).bfloat16().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    losses = []
    for packing in (False, True):
        recipe = make_recipe(
            train={"batch_size": 12, "packing": packing, "max_length": 256}, adapter={"targets": "attention"}
        )
        out = tmp_path / str(packing)
        summary = train_model(
            tmp_path / "base", TrainingData(examples), recipe, out, out / "c", number_type=NumberType.BFLOAT16
        )
        losses.append(losses_of(summary))
    [[alone], [packed]] = losses
    assert packed == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize(
    ("number_type", "mixed", "optimizer"),
    [
        (NumberType.BFLOAT16, (True, False), "adamw_torch_fused"),
        (NumberType.FLOAT32, (False, False), "adamw_torch_fused"),
        (NumberType.FLOAT16, (False, True), "adamw_torch"),
    ],
)
def test_dtype_determines_mixed_precision_and_optimizer(
    number_type: NumberType, mixed: tuple[bool, bool], optimizer: str, tmp_path: Path
) -> None:
    acceleration = choose_acceleration(Facts())
    arguments = training_arguments(make_recipe(), 1e-3, tmp_path, acceleration, 10, number_type)
    assert (arguments.bf16, arguments.fp16) == mixed
    assert arguments.optim == optimizer
