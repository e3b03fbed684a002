"""TRL's trainer with a loss that is cheaper on CPUs: shared prompts are computed only once, and the output
head only at answer positions.

On the CPU, TRL scores every position and computes entropy over the vocabulary. On other devices, TRL's own loss already
scores only answer positions, and is used if its logits match the model's logits. Nothing is added to the trainer's
state, so checkpoints can be resumed unchanged. Imports torch and TRL.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutput, ModelOutput, MoeModelOutputWithPast
from trl.trainer.sft_trainer import SFTTrainer

from trainer.callbacks.divergence import diverged
from trainer.callbacks.loss_log import ACCURACY
from trainer.data.chat_template import IGNORED
from trainer.model.experts import count_experts, name_experts
from trainer.training.cpu.fused_attention import fuse_attention
from trainer.training.cpu.lora_autograd import fuse_lora
from trainer.training.parallel.sharding import is_sharded

_MIN_SHARED = 16  # tokens; a shorter prefix does not repay a second pass through the model
_LOGITS_AT_ONCE = 2**26  # 256 MiB in float32, and as much for their gradient
_TRIED, _LARGEST_TRIED = 16, 100.0  # number of hidden states that test TRL's head, and their largest logit


class AnswerTrainer(SFTTrainer):
    """`SFTTrainer` for examples given as `input_ids` and `labels` that are padded on the right."""

    aux_loss_enabled: bool  # TRL's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        on_cpu, config = self.args.device.type == "cpu", self.model.config.get_text_config()
        name_experts(config)
        if self.aux_loss_enabled and not count_experts(config):  # Granite 4's small models are mixtures only by name
            self.aux_loss_enabled, config.output_router_logits = False, False
        # A mixture of experts has a second loss, which TRL adds. TRL's head is right for all of them.
        self._scores_answers = not self.aux_loss_enabled and (on_cpu or not fused_head_is_right(self.model))
        if on_cpu:
            fuse_lora(self.model)
            fuse_attention(self.model)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean cross entropy of the answer tokens, in nats. With AdaLoRA, the regularization term is added.

        Raises:
            TrainingError: the loss is not finite.
        """
        input_ids, labels, positions = inputs["input_ids"], inputs["labels"], inputs.get("position_ids")
        # With FlashAttention TRL separates packed examples; without, only the mask derived from positions does.
        packed = positions is not None and not self.padding_free
        outputs = None
        if return_outputs or self.aux_loss_enabled or not (self._scores_answers or packed):
            if packed:
                del inputs["attention_mask"]  # with a mask, transformers does not separate the examples of a row
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if return_outputs else (result, None)
        else:
            answer_tokens = num_items_in_batch
            if answer_tokens is None:
                answer_tokens = self.accelerator.gather((labels != IGNORED).sum()).sum()
            # NEFTune's noise is scaled by the length of the sequence that the model gets.
            share = self.args.neftune_noise_alpha is None
            correct: list[Tensor] = []

            def summed() -> Tensor:
                return answer_loss(self.model, input_ids, labels, positions, share_prefix=share, correct=correct)

            # Tokens are counted on all devices, and gradients are averaged over the devices.
            loss = as_forward_pass(model, summed, input_ids) * self.accelerator.num_processes / answer_tokens
            self._note_accuracy(torch.stack(correct).sum(), (labels[:, 1:] != IGNORED).sum())
        loss = self.finished(loss, accumulated=num_items_in_batch is not None)
        return (loss, outputs) if return_outputs else loss

    def _note_accuracy(self, correct: Tensor, tokens: Tensor) -> None:
        """Add a batch to the mean token accuracy that TRL logs with the loss."""
        correct, tokens = self.accelerator.gather(torch.stack([correct, tokens])).view(-1, 2).sum(dim=0)
        self._metrics["train"][ACCURACY].append((correct / tokens.clamp(min=1)).item())

    def finished(self, loss: Tensor, *, accumulated: bool) -> Tensor:
        """Return a batch's loss, with AdaLoRA's regularization added in training, after checking that it is finite.

        Args:
            accumulated: whether the losses of accumulated batches are summed, so that each batch must contribute only
                its share.

        Raises:
            TrainingError: the loss is not finite.
        """
        penalty = orthogonality_penalty(self.model)
        if penalty is not None and self.model.training:
            loss = loss + penalty / (self.current_gradient_accumulation_steps if accumulated else 1)
        if not torch.isfinite(loss):
            raise diverged(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}",
                self.args.learning_rate,
                first_in_float16=self.args.fp16 and self.state.global_step == 0,
            )
        return loss


def as_forward_pass(model: torch.nn.Module, work: Callable[[], Tensor], inputs: Tensor) -> Tensor:
    """Call a function that computes the loss. If the model is wrapped for several devices, the call counts as the
    wrapper's forward pass.

    The wrapper averages the gradients of whatever its forward pass returns. The loss calls the wrapped model several
    times and reads its hidden states, and none of these calls may go through the wrapper.

    Args:
        work: function that calls the wrapped model directly.
        inputs: any inputs for the forward pass. The wrapper requires them, but `work` does not use them.
    """
    if not isinstance(model, DistributedDataParallel):
        return work()
    wrapped = model.module
    before = vars(wrapped).get("forward")

    def restore() -> None:
        vars(wrapped).pop("forward", None)
        if before is not None:
            wrapped.forward = before

    def forward(*ignored: Any) -> Tensor:
        restore()
        return work()

    wrapped.forward = forward
    try:
        loss: Tensor = model(inputs)
    finally:
        restore()
    return loss


def fused_head_is_right(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether TRL's output head computes the same log-probabilities as the model's own forward pass.

    TRL multiplies hidden states by the head's weights itself. For most models that scale or cap their logits, such as
    Granite, Cohere and Gemma, TRL finds the scale or cap in the config. TRL silently ignores scales and caps that it
    does not know, such as RecurrentGemma's cap and Inkling's scale. These are detected with hidden states whose logits
    reach 100, where the difference far exceeds the rounding error of any data type.

    Args:
        model: a model to which TRL has added its output head.
    """
    base = _without_adapter(model)
    weight = base.get_output_embeddings().weight
    hidden = torch.randn(_TRIED, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    labels = torch.arange(_TRIED, device=weight.device).unsqueeze(dim=0)
    with torch.no_grad():
        hidden = hidden * (_LARGEST_TRIED / (hidden @ weight.T).abs().max())
        own = _logits(base, hidden)[:-1].log_softmax(dim=-1).gather(1, labels[:, 1:].T)[:, 0]
        with _forward_replaced(_decoder(base), _DecoderOutput(last_hidden_state=hidden.unsqueeze(dim=0))):
            fused = base(input_ids=torch.zeros_like(labels), labels=labels, fused_lm_head=True).log_probs[0]
    return torch.allclose(fused.float(), own, rtol=0.02, atol=1.0)


def answer_loss(
    model: PreTrainedModel | PeftModel,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    *,
    share_prefix: bool = True,
    correct: list[Tensor] | None = None,
) -> Tensor:
    """Return the cross entropy summed over the answer tokens, in nats.

    The common prefix of all prompts in the batch, such as a system prompt, is computed once, and all rows
    attend to its keys and values. The gradient flows back through these, so the result equals the loss of
    the complete batch. Padding needs no mask, because it is on the right and attention is causal.

    Args:
        input_ids: token ids of shape [batch, length].
        labels: tensor of shape [batch, length], with the token id at positions that count toward the loss and
            -100 elsewhere. These positions may be anywhere in a row.
        position_ids: positions of shape [batch, length] for packed rows, in which they restart with each
            example.
        share_prefix: whether to share the common prefix. If false, each row is computed in full.
        correct: list to which the number of correctly predicted answer tokens is appended, possibly as several partial
            counts.
    """
    hidden, targets = _before_answers(model, input_ids, labels, position_ids, share_prefix=share_prefix)
    return _summed_cross_entropy(model, hidden, targets, _LOGITS_AT_ONCE, correct)


def answer_token_losses(
    model: PreTrainedModel | PeftModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Return the cross entropy of each answer token in nats, row by row, without a gradient. For the
    arguments, see `answer_loss`.
    """
    hidden, targets = _before_answers(model, input_ids, labels, position_ids, share_prefix=True)
    size = max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([_token_losses(model, *part) for part in parts])


def answer_logprobs(
    model: PreTrainedModel | PeftModel, input_ids: Tensor, labels: Tensor, balance: "Balance | None" = None
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each row's answer, in nats and summed over its tokens, and the number of these
    tokens. The log-probabilities can be differentiated. For the other arguments, see `answer_loss`.

    Args:
        balance: receives the load-balancing loss of a mixture of experts. If given, each row is computed in full.

    Returns:
        Two tensors of shape [batch], in float32.
    """
    hidden, targets = _before_answers(model, input_ids, labels, None, share_prefix=balance is None, balance=balance)
    size = max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    if len(hidden) <= size:
        losses = _token_losses(model, hidden, targets)
    else:
        losses = torch.cat([checkpoint(_token_losses, model, *part, use_reentrant=False) for part in parts])
    counts = (labels[:, 1:] != IGNORED).sum(dim=1)
    return -torch.stack([row.sum() for row in losses.split(counts.tolist())]), counts.float()


@dataclass
class Balance:
    """Load-balancing loss of a mixture of experts for one batch.

    Attributes:
        attention_mask: mask of the tokens that are not padding, of shape [batch, length].
        loss: the loss, before multiplication by its coefficient.
    """

    attention_mask: Tensor
    loss: Tensor | None = None


def _before_answers(
    model: PreTrainedModel | PeftModel,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None,
    *,
    share_prefix: bool,
    balance: Balance | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the hidden states at the positions that predict answer tokens, together with those tokens."""
    share_prefix = share_prefix and position_ids is None and _can_share(model)
    shared = shared_prefix(input_ids, labels) if share_prefix else 0
    cache = None
    if shared:
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(input_ids))
    targets = labels[:, shared + 1 :]
    learnt = targets != IGNORED
    return _hidden_states(model, learnt, input_ids[:, shared:], cache, position_ids, balance), targets[learnt]


def orthogonality_penalty(model: torch.nn.Module) -> Tensor | None:
    """Return AdaLoRA's weighted regularization term, or None for other adapters. PEFT adds it only to the model's own
    loss.

    AdaLoRA's singular vectors are free matrices that are pulled towards orthogonality (Zhang et al. 2023,
    eq. 4). The penalty is computed by PEFT's own code, called on a model that only returns a loss of 0.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, AdaLoraModel):
        return None
    zero = torch.zeros((), device=next(model.parameters()).device)
    with _forward_replaced(tuner.model, CausalLMOutput(loss=zero)):
        penalty: Tensor = tuner.forward().loss
    return penalty


def _hidden_states(
    model: PreTrainedModel | PeftModel,
    learnt: Tensor,
    input_ids: Tensor,
    cache: DynamicCache | None,
    position_ids: Tensor | None,
    balance: Balance | None,
) -> Tensor:
    """Return the hidden states from which the target tokens are predicted, with shape [number of target tokens, width].
    Target tokens are those that count toward the loss.

    `logits_to_keep` is not used because it keeps the same positions in every row. Because rows end at different
    positions, these can be ten times as many as are needed. The logits that the model returns are ignored.

    Args:
        learnt: mask of shape [batch, length - 1], true where the next token counts toward the loss.
    """
    selected: list[Tensor] = []

    def select(decoder: torch.nn.Module, inputs: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
        selected.append(output.last_hidden_state[:, :-1][learnt])
        output.last_hidden_state = output.last_hidden_state[:1, :1]  # with no row PyTorch copies the head's weights
        return output

    mask = {} if balance is None else {"attention_mask": balance.attention_mask}
    hook = _decoder(model).register_forward_hook(select)
    try:
        output = model(
            input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, position_ids=position_ids, **mask
        )
    finally:
        hook.remove()
    if balance is not None:
        balance.loss = output.aux_loss
    return selected[0]


def _summed_cross_entropy(
    model: PreTrainedModel | PeftModel,
    hidden: Tensor,
    targets: Tensor,
    logits_at_once: int,
    correct: list[Tensor] | None = None,
) -> Tensor:
    """Return the sum of the cross entropy over the given positions, in nats.

    Long answers are scored in parts, and the logits of each part are recomputed for its gradient. This way,
    the logits of all positions are never in memory at the same time.

    Args:
        hidden: hidden states of shape [positions, width], from `_hidden_states`.
        targets: token ids of shape [positions].
        logits_at_once: maximum number of logits in memory (positions times vocabulary).
        correct: as in `answer_loss`. When logits are recomputed for the gradient, the counts of correct
            predictions are appended a second time.
    """
    size = max(1, logits_at_once // model.config.get_text_config().vocab_size)
    if len(hidden) <= size:
        return _cross_entropy(model, hidden, targets, correct)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    losses = [checkpoint(_cross_entropy, model, *part, correct, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum()


def _cross_entropy(
    model: PreTrainedModel | PeftModel, hidden: Tensor, targets: Tensor, correct: list[Tensor] | None
) -> Tensor:
    logits = _logits(model, hidden)
    if correct is not None:
        correct.append((logits.detach().argmax(dim=-1) == targets).sum())
    return cross_entropy(logits, targets, reduction="sum")


def _token_losses(model: PreTrainedModel | PeftModel, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(_logits(model, hidden), targets, reduction="none")


def _logits(model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
    """Compute the logits with the model's own forward pass, because some models scale or cap logits or scale
    hidden states.

    Args:
        hidden: hidden states of shape [positions, width], from `_hidden_states`.

    Returns:
        The logits in float32, of shape [positions, vocabulary].
    """
    ignored = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
    with _forward_replaced(_decoder(model), _DecoderOutput(last_hidden_state=hidden.unsqueeze(dim=0))):
        logits: Tensor = model(input_ids=ignored, use_cache=False).logits
    return logits[0].float()


def _decoder(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """Return the part of the model that computes the inputs of the output head."""
    base = _without_adapter(model)
    decoder = base.get_decoder()
    # `get_decoder` returns a part of the head for ModernBERT's decoder, and the complete model for Llama 4.
    module: torch.nn.Module = decoder if isinstance(decoder, PreTrainedModel) and decoder is not base else base.model
    return module


def _without_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the underlying model without PEFT's wrapper. It still contains the adapter's layers."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


class _DecoderOutput(MoeModelOutputWithPast):
    """A decoder output that contains only hidden states. Every other attribute is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _forward_replaced(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """Make a module return the given output for any input within the `with` block."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def shared_prefix(input_ids: Tensor, labels: Tensor) -> int:
    """Return the length of the rows' common prefix, up to the first position that predicts an answer token.
    Return 0 if there is only one row or the prefix is short.

    Args:
        input_ids: token ids of shape [batch, length].
        labels: tensor of shape [batch, length], with -100 at positions that do not count toward the loss.
    """
    if len(input_ids) < 2:
        return 0
    differs = (input_ids != input_ids[:1]).any(dim=0)
    predicts = torch.zeros_like(differs)
    predicts[:-1] = (labels[:, 1:] != IGNORED).any(dim=0)
    ends = (differs | predicts).nonzero()
    shared = int(ends[0]) if len(ends) else 0
    return shared if shared >= _MIN_SHARED else 0


def _can_share(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether rows can share the keys and values of a prefix. This is not possible with gradient checkpointing,
    which runs layers without a cache. Nor is it possible with weights sharded across devices: the gradients of keys and
    values would reach a layer's weights before these are gathered.
    """
    if is_sharded(model):
        return False
    return not _without_adapter(model).is_gradient_checkpointing and keeps_all_keys(model.config)


def keeps_all_keys(config: PreTrainedConfig) -> bool:
    """Return whether every layer attends to all earlier positions, without a sliding window or a recurrent
    state.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
