"""Supervised fine-tuning: chat examples and a base model in, a LoRA adapter out.

Only the final answer is learnt, up to and with the token that ends it; all turns before are context. Knows nothing of
where examples come from, of registered versions, or of how good the adapter is.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.dataset.example import ChatExample
from svc.errors import DataError, TrainingError
from svc.terminal import waiting
from trainer.library_output import library_output_to_log
from trainer.recipe import Recipe
from trainer.training_example import TrainingExample, load_tokenizer, stop_tokens, tokenize_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trainer.answer_trainer import AnswerTrainer

_LOG_EVERY = 0.01  # of all steps: a hundred points draw a loss curve


@dataclass(frozen=True, slots=True)
class LossPoint:
    """Mean loss of the steps since the point before, nats a token."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """How a training run went.

    Attributes:
        tokens: prompt and answer tokens seen, without padding.
        final_loss: nats an answer token, the last point of the curve.
        seconds: of the optimizer's run alone, without loading.
    """

    steps: int
    tokens: int
    tokens_per_second: float
    final_loss: float
    seconds: float
    loss_curve: tuple[LossPoint, ...]


def train_adapter(
    base: Path, examples: Sequence[ChatExample], recipe: Recipe, out: Path, *, log_to_mlflow: bool = False
) -> TrainingSummary:
    """Trains a LoRA adapter on all linear layers and writes it, with the tokenizer, to `out`.

    Args:
        base: folder of the base model (trainer.base_model).
        out: created if need be; gets adapter_config.json, adapter_model.safetensors and the tokenizer's files.
        log_to_mlflow: loss and hyperparameters go to the run that is active in this process.

    Raises:
        DataError: examples longer than `train.max_length` tokens, or that the chat template refuses.
        TrainingError: the loss or a weight is not finite.
    """
    from trainer.progress import training_progress

    tokenizer = load_tokenizer(base)
    rows = tokenize_examples(tokenizer, examples, stop_tokens(base, tokenizer))
    _check_lengths(rows, recipe.train.max_length)
    with waiting("Loading the base model"), library_output_to_log():
        trainer = _build_trainer(base, tokenizer, rows, recipe, out, log_to_mlflow)
    started = time.monotonic()
    with training_progress() as progress:
        trainer.add_callback(progress)
        trainer.train()
    seconds = time.monotonic() - started
    _check_finite(trainer.model)
    _save(trainer.model, tokenizer, out)
    state = trainer.state
    curve = tuple(LossPoint(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry)
    tokens = int(state.num_input_tokens_seen)
    return TrainingSummary(state.global_step, tokens, tokens / seconds, curve[-1].loss, seconds, curve)


def _check_lengths(rows: list[TrainingExample], max_length: int) -> None:
    lengths = [len(row.input_ids) for row in rows]
    too_long = sum(length > max_length for length in lengths)
    if too_long:
        longest = max(lengths)
        raise DataError(
            f"{too_long} of {len(rows)} examples are longer than {max_length} tokens; "
            f"the longest, number {lengths.index(longest) + 1}, has {longest}",
            expected="whole examples: they are never cut",
            todo=f"set train.max_length to {longest} or more, or shorten or drop those examples",
        )


def _build_trainer(
    base: Path,
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[TrainingExample],
    recipe: Recipe,
    out: Path,
    log_to_mlflow: bool,
) -> "AnswerTrainer":
    """The base's weights are frozen in bf16, the adapter is in float32: Adam's small steps vanish in bf16."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PrinterCallback
    from transformers.utils import logging

    from trainer.answer_trainer import AnswerTrainer

    logging.disable_progress_bar()
    lora = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = AnswerTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        args=_training_arguments(recipe, out, log_to_mlflow),
        train_dataset=Dataset.from_list([row.as_row() for row in rows]),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(recipe: Recipe, out: Path, log_to_mlflow: bool) -> Any:
    import torch
    from trl.trainer.sft_config import SFTConfig

    accelerated = torch.accelerator.is_available()
    return SFTConfig(
        output_dir=str(out),
        learning_rate=recipe.train.learning_rate,
        num_train_epochs=recipe.train.epochs,
        per_device_train_batch_size=recipe.train.batch_size,
        warmup_steps=recipe.train.warmup_ratio,
        seed=recipe.train.seed,
        max_length=None,
        bf16=True,
        use_cpu=not accelerated,
        # Memory is what a GPU lacks, time is what a CPU lacks.
        gradient_checkpointing=accelerated,
        dataloader_pin_memory=accelerated,
        train_sampling_strategy="group_by_length",
        include_num_input_tokens_seen="non_padding",
        logging_steps=_LOG_EVERY,
        save_strategy="no",
        report_to=["mlflow"] if log_to_mlflow else "none",
        disable_tqdm=True,
    )


def _check_finite(model: "PreTrainedModel") -> None:
    import torch

    for name, weight in model.named_parameters():
        if weight.requires_grad and not torch.isfinite(weight).all():
            raise TrainingError(
                f"{name} holds a value that is not finite",
                expected="finite weights",
                todo="lower train.learning_rate in the recipe, to a third for a start",
            )


def _save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
