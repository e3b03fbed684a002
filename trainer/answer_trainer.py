"""TRL's trainer with a loss that a CPU can afford: shared prompts once, the head at answer positions only.

On the CPU TRL scores every position and computes entropy over the vocabulary; on other devices its own loss already
scores answer positions alone, and is used as it is. Loaded only inside functions: it imports torch and TRL.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from trl.trainer.sft_trainer import SFTTrainer

from svc.errors import TrainingError
from trainer.training_example import IGNORED

_WORTH_SHARING = 16  # tokens; a shorter prefix does not repay a second pass through the model


class AnswerTrainer(SFTTrainer):
    """`SFTTrainer` on examples of `input_ids` and `labels`, padded on the right."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross entropy of the answer tokens, nats.

        Raises:
            TrainingError: the loss is not finite.
        """
        input_ids, labels = inputs["input_ids"], inputs["labels"]
        if input_ids.device.type != "cpu" or return_outputs:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = result[0] if return_outputs else result
        else:
            answer_tokens = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            result = loss = answer_loss(model, input_ids, labels) / answer_tokens
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}",
                expected="a finite loss",
                todo="lower train.learning_rate in the recipe, to a third for a start",
            )
        return result


def answer_loss(model: PreTrainedModel | PeftModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the answer tokens, nats.

    What all prompts of the batch begin with, as a system prompt, goes through the model once and is attended to from
    its keys and values; the gradient flows back through them, so that this is the loss of the whole batch. Padding
    needs no mask: it stands on the right, and attention is causal.

    Args:
        input_ids: [batch, length].
        labels: [batch, length]; the token id where it is to be learnt, else -100.
    """
    shared = _shared_prefix(input_ids, labels) if _keeps_all_keys(model.config) else 0
    cache = None
    if shared >= _WORTH_SHARING:
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(input_ids))
    else:
        shared = 0
    targets = labels[:, shared + 1 :]
    learnt = targets != IGNORED
    with _head_at(model, learnt):
        logits = model(input_ids=input_ids[:, shared:], past_key_values=cache, use_cache=cache is not None).logits
    return cross_entropy(logits.float().flatten(0, 1), targets[learnt], reduction="sum")


@contextmanager
def _head_at(model: PreTrainedModel | PeftModel, positions: Tensor) -> Iterator[None]:
    """Applies the head to these positions alone; logits are then [1, number of them, vocabulary].

    `logits_to_keep` would score them for all rows of the batch, or ten times as many: rows end at different places.

    Args:
        positions: [batch, length - 1], true where the next token is learnt.
    """

    def select(head: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][:, :-1][positions].unsqueeze(dim=0),)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _shared_prefix(input_ids: Tensor, labels: Tensor) -> int:
    """Tokens that all rows begin with and that predict no answer token; 0 for a single row."""
    if len(input_ids) < 2:
        return 0
    differs = (input_ids != input_ids[:1]).any(dim=0)
    predicts = torch.zeros_like(differs)
    predicts[:-1] = (labels[:, 1:] != IGNORED).any(dim=0)
    ends = (differs | predicts).nonzero()
    return int(ends[0]) if len(ends) else 0


def _keeps_all_keys(config: PreTrainedConfig) -> bool:
    """Whether every layer attends to all earlier positions: a sliding window or a recurrent state cannot be shared."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
