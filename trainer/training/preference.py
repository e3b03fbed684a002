"""Preference tuning with DPO, ORPO and KTO, in the same resumable trainer as supervised fine-tuning.

TRL's own DPOTrainer, KTOTrainer and ORPOTrainer are not used, only their definition of the losses, with which the
tests compare these, value by value. Each of them would have to be corrected in other places to keep what a run here
promises:

- they render and cut prompts themselves, so that a template that renders prompt and conversation differently would
  train another prompt than the engine's; ORPOTrainer also learns the prompts;
- DPOTrainer and KTOTrainer give an adapter a frozen twin, which AdaLoRA cannot have and the saved adapter would
  contain; KTOTrainer forms its mismatched answers in the order of the files;
- they average each batch, so that half the batch with twice the accumulation would be another training if the last
  batch is smaller;
- on CPUs they compute the head and its entropy at all positions.

The model before training is the reference. Its log-probabilities are computed once, before the first step, and are
part of each checkpoint, so that no second model is in memory, a resumed run has the same ones, and full fine-tuning
works. Imports torch and TRL.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from svc.dataset.schema.objective import Objective
from svc.terminal import counting
from trainer.data.comparison import Comparison, collate_comparisons, comparison_row
from trainer.model.acceleration import choose_acceleration, machine_facts, takes_liger_kernels
from trainer.model.attention import takes_flash_attention
from trainer.recipe.recipe import Recipe
from trainer.training.assembly import TrainerRows, TrainerSetup, assemble_trainer
from trainer.training.loss import answer_logprobs
from trainer.training.preference_loss import dpo_losses, kto_losses, orpo_losses
from trainer.training.trainer import ResumableTrainer

_REFERENCE = "reference.safetensors"


class PreferenceTrainer(ResumableTrainer):
    """`ResumableTrainer` for batches of comparisons. A step's loss is the mean over its comparisons.

    The second loss of a mixture of experts, which balances them, is not added.

    Args:
        recipe: the run's recipe, whose objective is not `sft`.
    """

    loss_is_scaled_for_ga = True  # transformers must not divide it by the number of accumulated batches

    def __init__(self, *, recipe: Recipe, **options: Any) -> None:
        self._objective, self._preference = recipe.objective, recipe.preference
        self._reference = torch.empty(2, 0)
        super().__init__(**options)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the batch's share of the mean loss of the step's comparisons.

        Raises:
            TrainingError: the loss is not finite.
        """
        losses = self._losses(model, inputs)
        comparisons = len(losses) if num_items_in_batch is None else num_items_in_batch
        return self.finished(losses.sum() / comparisons, accumulated=num_items_in_batch is not None)

    def row_losses(self, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return the loss of each held-out comparison."""
        losses: list[float] = self._losses(self.model, batch).tolist()
        return losses

    @staticmethod
    def weight(row: dict[str, Any]) -> int:
        """Return the weight of a row's loss, which is the same for all comparisons."""
        return 1

    def load_weights(self, checkpoint: Path) -> None:
        """Load the trained weights, and the reference log-probabilities."""
        super().load_weights(checkpoint)
        if self._objective.needs_reference:
            self._reference = load_file(checkpoint / _REFERENCE)["logprobs"].to(self.args.device)

    def prepare_run(self) -> None:
        """Compute the reference log-probabilities of all comparisons, if the objective needs them.

        Raises:
            StepAbandoned: a signal was received.
        """
        if not self._objective.needs_reference:
            return
        rows = sorted([*self.train_dataset, *self._heldout], key=lambda row: len(row["input_ids"]))
        reference = torch.zeros(2, 1 + max(row["index"] for row in rows))
        size = self.args.per_device_train_batch_size
        self.model.eval()
        with (
            self._preemption.interruptible(),
            counting("Scoring the answers with the model before training", len(rows)) as advance,
            torch.no_grad(),
            self.accelerator.autocast(),
            self.compute_loss_context_manager(),
        ):
            for start in range(0, len(rows), size):
                batch = self._prepare_inputs(self.data_collator(rows[start : start + size]))
                logprobs, _ = answer_logprobs(self.model, batch["input_ids"], batch["labels"])
                reference[:, batch["index"].cpu()] = logprobs.view(2, -1).cpu()
                advance(len(batch["index"]))
        self.model.train()
        self._reference = reference.to(self.args.device)

    def _losses(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the loss of each comparison in a batch."""
        half, ids, labels = len(batch["index"]), batch["input_ids"], batch["labels"]
        if self._objective is Objective.KTO:
            answers, _ = answer_logprobs(model, ids[:half], labels[:half])
            with torch.no_grad():
                others, _ = answer_logprobs(model, ids[half:], labels[half:])
            before = self._before(batch)
            return kto_losses(answers - before[0], others - before[1], batch["desirable"], self._preference)
        logprobs, counts = answer_logprobs(model, ids, labels)
        first, second = logprobs.split(half)
        tokens = counts[:half], counts[half:]
        if self._objective is Objective.ORPO:
            return orpo_losses(first / tokens[0], second / tokens[1], self._preference)
        before = self._before(batch)
        return dpo_losses(first - before[0], second - before[1], tokens, self._preference)

    def _before(self, batch: dict[str, Any]) -> Tensor:
        """Return the reference log-probabilities of a batch, [2, comparisons]."""
        return self._reference[:, batch["index"]]

    def _save_more(self, folder: Path) -> None:
        if self._objective.needs_reference:
            save_file({"logprobs": self._reference.cpu().contiguous()}, folder / _REFERENCE)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> int:
        return sum(len(batch["index"]) for batch in batch_samples)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.train_dataset.column_names)  # all of them are needed

    def _row_lengths(self) -> list[int]:
        columns = zip(self.train_dataset["input_ids"], self.train_dataset["second_input_ids"], strict=True)
        return [max(len(first), len(second)) for first, second in columns]


def build_preference_trainer(
    setup: TrainerSetup, comparisons: Sequence[Comparison], heldout: Sequence[Comparison]
) -> ResumableTrainer:
    """Build the trainer of a run that learns a preference.

    Args:
        comparisons: the comparisons to train on.
        heldout: comparisons whose loss is measured during training.
    """
    flash, liger = takes_flash_attention(setup.base), takes_liger_kernels(setup.base)
    tokenizer = setup.tokenizer
    acceleration = choose_acceleration(machine_facts(), flash=flash, liger=liger)
    acceleration = replace(acceleration, padding_free=False)  # a batch needs one row for each answer
    pad_token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = TrainerRows(
        Dataset.from_list([comparison_row(comparison, index) for index, comparison in enumerate(comparisons)]),
        partial(collate_comparisons, pad_token=pad_token),
        sum(len(comparison.first.input_ids) for comparison in comparisons),
        [comparison_row(comparison, index) for index, comparison in enumerate(heldout, start=len(comparisons))],
    )
    return assemble_trainer(setup, rows, acceleration, make=partial(PreferenceTrainer, recipe=setup.recipe))
