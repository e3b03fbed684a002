"""Preference tuning with DPO, ORPO and KTO, in the same resumable trainer as supervised fine-tuning.

TRL's own DPOTrainer, KTOTrainer and ORPOTrainer are not used. Tests compare the losses here with theirs, value by
value. These trainers would need various corrections to meet our guarantees for a run:

- they render and truncate prompts themselves, so that with a template that renders prompt and conversation differently,
  the prompt in training would differ from the engine's; ORPOTrainer also learns the prompts;
- DPOTrainer and KTOTrainer add a frozen copy of the adapter, which AdaLoRA does not support and which would be saved
  with the adapter; KTOTrainer selects mismatched answers (answers to other prompts) by their
  order in the files;
- they average each batch, so that half the batch size with twice the accumulation would give a different result if the
  last batch is smaller;
- on CPUs they compute the head and its entropy at all positions.

The reference is the model before training. Its log-probabilities are computed once, before the first step, and are part
of each checkpoint. No second model is therefore needed in memory, a resumed run uses the same values, and full
fine-tuning works.

Several devices divide the comparisons of a step among them. A device that has no comparison left computes a filler,
which is a comparison of two answers without tokens. Imports torch and TRL.
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
from torch.nn.functional import logsigmoid

from svc.dataset.schema.objective import Objective
from svc.terminal import counting
from trainer.data.chat_template import IGNORED
from trainer.data.comparison import Comparison, collate_comparisons, comparison_row
from trainer.model.acceleration import choose_acceleration, machine_facts, takes_liger_kernels
from trainer.model.attention import takes_flash_attention
from trainer.recipe.preference import DpoLoss, Preference
from trainer.recipe.recipe import Recipe
from trainer.training.assembly import TrainerRows, TrainerSetup, assemble_trainer
from trainer.training.loss import Balance, answer_logprobs, as_forward_pass
from trainer.training.parallel.sharding import release_gathered
from trainer.training.trainer import ResumableTrainer, without_answers

_REFERENCE = "reference.safetensors"
_LARGEST_LOGPROB = -1e-6  # per token, in nats: an answer's odds are infinite if it is certain


def dpo_losses(chosen: Tensor, rejected: Tensor, tokens: tuple[Tensor, Tensor], preference: Preference) -> Tensor:
    """Return DPO's loss for each pair.

    Args:
        chosen, rejected: log of the ratio of each answer's probability to its probability under the model before
            training, of shape [pairs].
        tokens: number of tokens in each chosen and in each rejected answer.
    """
    beta, wrong = preference.beta, preference.label_smoothing
    difference = beta * (chosen - rejected)
    match preference.loss:
        case DpoLoss.SIGMOID:
            return -logsigmoid(difference)
        case DpoLoss.ROBUST:
            return (wrong * logsigmoid(-difference) - (1 - wrong) * logsigmoid(difference)) / (1 - 2 * wrong)
        case DpoLoss.IPO:  # per token, as its authors confirmed to TRL
            return (chosen / tokens[0] - rejected / tokens[1] - 1 / (2 * beta)) ** 2


def orpo_losses(chosen: Tensor, rejected: Tensor, preference: Preference) -> Tensor:
    """Return ORPO's loss for each pair: the chosen answer's negative log-likelihood plus `beta` times the odds ratio
    loss (Hong et al. 2024, eq. 6 and 7).

    Args:
        chosen, rejected: mean log-probability of each answer's tokens, of shape [pairs].
    """
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - preference.beta * logsigmoid(log_odds)


def _log_odds(logprob: Tensor) -> Tensor:
    """Return log(p / (1 - p)) for p = exp(logprob)."""
    logprob = logprob.clamp(max=_LARGEST_LOGPROB)
    return logprob - torch.log(-torch.expm1(logprob))


def kto_losses(answers: Tensor, shift: Tensor, desirable: Tensor, preference: Preference) -> Tensor:
    """Return KTO's loss for each answer (Ethayarajh et al. 2024, eq. 8).

    Args:
        answers: tensor of shape [answers], with log(p / p0) for each answer. p is the answer's probability under the
            model, and p0 its probability under the model before training.
        shift: mean log ratio of mismatched answers (answers to other prompts), without gradient. If positive, it
            measures how far the model as a whole has shifted, and is subtracted from each log ratio.
        desirable: boolean label of each answer, true if the answer is desirable.
    """
    distance = preference.beta * (answers - shift.clamp(min=0))
    wanted = preference.desirable_weight * (1 - torch.sigmoid(distance))
    unwanted = preference.undesirable_weight * (1 - torch.sigmoid(-distance))
    return torch.where(desirable, wanted, unwanted)


class PreferenceTrainer(ResumableTrainer):
    """`ResumableTrainer` for batches of comparisons. A step's loss is the mean over its comparisons.

    As in TRL, the load-balancing loss of a mixture of experts is added, as a mean over batches.

    Args:
        recipe: the run's recipe, whose objective is dpo, orpo or kto.
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
        """Return the batch's contribution to the loss, which is the mean over all comparisons in the step.

        Raises:
            TrainingError: the loss is not finite.
        """
        comparisons = num_items_in_batch
        if comparisons is None:
            comparisons = self.accelerator.gather(_real(inputs).sum()).sum()
        accumulated = num_items_in_batch is not None

        def share() -> Tensor:
            balance = self._balance(inputs)
            # Comparisons are counted on all devices, and gradients are averaged over the devices.
            loss = self._losses(inputs, balance).sum() * self.accelerator.num_processes / comparisons
            if balance is None or balance.loss is None:
                return loss
            steps = self.current_gradient_accumulation_steps if accumulated else 1
            return loss + self.router_aux_loss_coef * balance.loss / steps

        return self.finished(as_forward_pass(model, share, inputs["input_ids"]), accumulated=accumulated)

    def _balance(self, batch: dict[str, Any]) -> Balance | None:
        """Return the object that receives a batch's load-balancing loss, or None if the model is not a mixture of
        experts.
        """
        rows = len(batch["index"]) if self._objective is Objective.KTO else len(batch["input_ids"])
        return Balance(batch["attention_mask"][:rows]) if self.aux_loss_enabled else None

    def row_losses(self, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return the loss of each held-out comparison."""
        losses: list[float] = self._losses(batch).tolist()
        return losses

    @staticmethod
    def weight(row: dict[str, Any]) -> int:
        """Return 1, because every comparison has the same weight in the held-out loss."""
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
        size = self.args.per_device_train_batch_size * self.group.size
        self.model.eval()
        with (
            counting("Scoring the answers with the model before training", len(rows)) as advance,
            torch.no_grad(),
            self.accelerator.autocast(),
            self.compute_loss_context_manager(),
        ):
            for start in range(0, len(rows), size):
                scored = rows[start : start + size]
                with self._preemption.interruptible():
                    logprobs = self.group.map(self._own_logprobs, scored)
                reference[:, [row["index"] for row in scored]] = torch.tensor(logprobs).T
                advance(len(scored))
        release_gathered(self.model)
        self.model.train()
        self._reference = reference.to(self.args.device)

    def _own_logprobs(self, rows: Sequence[dict[str, Any]]) -> list[list[float]]:
        """Return the log-probabilities of both answers in each of this process's rows."""
        batch = self._prepare_inputs(self.data_collator(rows or [self.train_dataset[0]]))
        logprobs, _ = answer_logprobs(self.model, batch["input_ids"], batch["labels"])
        both: list[list[float]] = logprobs.view(2, -1).T.tolist()
        return both[: len(rows)]

    def _own_loss_sums(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return the loss of each of this process's rows. With KTO, a process without rows computes and discards the
        loss of a filler row, because all processes take part in computing the batch mean.
        """
        if self.group.size > 1 and not rows and self._objective is Objective.KTO:
            self.loss_sums([without_answers(self._heldout[0])])
            return []
        return super()._own_loss_sums(rows)

    def _losses(self, batch: dict[str, Any], balance: Balance | None = None) -> Tensor:
        """Return the loss of each comparison in a batch. Devices that have no comparisons left compute fillers, whose
        loss is 0.

        Args:
            balance: receives the load-balancing loss; with KTO, only that of the answers computed with gradients.
        """
        model, half, ids, labels = self.model, len(batch["index"]), batch["input_ids"], batch["labels"]
        before = self._reference[:, batch["index"]] if self._objective.needs_reference else None
        real = _real(batch)
        if self._objective is Objective.KTO and before is not None:
            with torch.no_grad():
                others, _ = answer_logprobs(model, ids[half:], labels[half:])
            shift = self._mean((others - before[1]) * real, real)
            answers, _ = answer_logprobs(model, ids[:half], labels[:half], balance)
            losses = kto_losses(answers - before[0], shift, batch["desirable"], self._preference)
            return losses * real
        logprobs, counts = answer_logprobs(model, ids, labels, balance)
        first, second = logprobs.split(half)
        one, other = counts.clamp(min=1).split(half)
        if before is None:
            return orpo_losses(first / one, second / other, self._preference) * real
        return dpo_losses(first - before[0], second - before[1], (one, other), self._preference) * real

    def _mean(self, values: Tensor, real: Tensor) -> Tensor:
        """Return the mean of `values` over the real comparisons on all devices.

        Args:
            values: one value per comparison, 0 for each filler.
            real: 1 for each real comparison, 0 for each filler.
        """
        total, count = self.accelerator.gather(torch.stack([values.sum(), real.sum()])).view(-1, 2).sum(dim=0)
        return total / count

    def _save_more(self, folder: Path) -> None:
        if self._objective.needs_reference:
            save_file({"logprobs": self._reference.cpu().contiguous()}, folder / _REFERENCE)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> int:
        return sum(self.group.gather(sum(int(_real(batch).sum()) for batch in batch_samples)))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.train_dataset.column_names)  # all of them are needed

    def _row_lengths(self) -> list[int]:
        columns = zip(self.train_dataset["input_ids"], self.train_dataset["second_input_ids"], strict=True)
        return [max(len(first), len(second)) for first, second in columns]


def _real(batch: dict[str, Any]) -> Tensor:
    """Return a tensor of shape [comparisons], with 1 for each real comparison of a batch and 0 for each filler."""
    learnt: Tensor = (batch["labels"][: len(batch["index"])] != IGNORED).any(dim=1)
    return learnt.float()


def build_preference_trainer(
    setup: TrainerSetup, comparisons: Sequence[Comparison], heldout: Sequence[Comparison]
) -> ResumableTrainer:
    """Build the trainer for a preference tuning run.

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
