"""TRL's trainer with a cheaper loss on CPUs: shared prompts are computed once, the output head only at
answer positions.

On the CPU, TRL scores every position and computes entropy over the vocabulary. On other devices its own
loss already scores only answer positions, and is used if its logits are those of the model. No state is
added to the trainer's own, so that checkpoints resume unchanged. Imports torch and TRL.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutput, ModelOutput, MoeModelOutputWithPast
from trl.trainer.sft_trainer import SFTTrainer

from trainer.callbacks.divergence import diverged
from trainer.cpu.fused_attention import fuse_attention
from trainer.cpu.lora_autograd import fuse_lora
from trainer.data.chat_template import IGNORED
from trainer.model.experts import count_experts, name_experts

_MIN_SHARED = 16  # tokens; a shorter prefix does not repay a second pass through the model
_LOGITS_AT_ONCE = 2**26  # 256 MiB in float32, and as much for their gradient
_TRIED, _LARGEST_TRIED = 16, 100.0  # number of hidden states that test TRL's head, and their largest logit


class AnswerTrainer(SFTTrainer):
    """`SFTTrainer` for examples given as `input_ids` and `labels`, padded on the right."""

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
        """Return the mean cross entropy of the answer tokens in nats, plus AdaLoRA's regularisation if it is used.

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
            answer_tokens = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            # NEFTune's noise is scaled by the length of the sequence that the model gets.
            share = self.args.neftune_noise_alpha is None
            loss = answer_loss(model, input_ids, labels, positions, share_prefix=share) / answer_tokens
        penalty = orthogonality_penalty(self.model)
        if penalty is not None and model.training:
            # As for TRL's second losses: accumulated batches are summed, so each batch adds its share.
            loss = loss + penalty / (self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1)
        if not torch.isfinite(loss):
            raise diverged(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}",
                self.args.learning_rate,
                first_in_float16=self.args.fp16 and self.state.global_step == 0,
            )
        return (loss, outputs) if return_outputs else loss


def fused_head_is_right(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether TRL's output head computes the same log-probabilities as the model's own forward pass.

    TRL multiplies hidden states by the head's weights itself, and knows from config keys how most models
    change logits: Granite's and Cohere's scale, Gemma's soft cap. Unknown changes, such as RecurrentGemma's
    cap and Inkling's scale, are silently ignored. Hidden states with logits of up to 100 show the
    difference, far above the rounding of any number type.

    Args:
        model: a model to which TRL has added its head.
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
) -> Tensor:
    """Return the cross entropy summed over the answer tokens, in nats.

    The common prefix of all prompts in the batch, such as a system prompt, is computed once, and the rows
    attend to its keys and values; the gradient flows back through them, so that this is the loss of the
    complete batch. Padding needs no mask: it is on the right, and attention is causal.

    Args:
        input_ids: [batch, length].
        labels: [batch, length]; the token id at learnt positions, which may be anywhere in a row, else -100.
        position_ids: [batch, length]; for packed rows, in which positions restart with each example.
        share_prefix: whether to share the common prefix; if false, each row is computed completely.
    """
    hidden, targets = _before_answers(model, input_ids, labels, position_ids, share_prefix=share_prefix)
    return _summed_cross_entropy(model, hidden, targets, _LOGITS_AT_ONCE)


def answer_token_losses(
    model: PreTrainedModel | PeftModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Return the cross entropy of each answer token in nats, row by row and without a gradient; see
    `answer_loss`.
    """
    hidden, targets = _before_answers(model, input_ids, labels, position_ids, share_prefix=True)
    size = max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([cross_entropy(_logits(model, part), wanted, reduction="none") for part, wanted in parts])


def _before_answers(
    model: PreTrainedModel | PeftModel,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None,
    *,
    share_prefix: bool,
) -> tuple[Tensor, Tensor]:
    """Return the hidden states at the positions before the answer tokens, and the answer tokens."""
    share_prefix = share_prefix and position_ids is None and _can_share(model)
    shared = shared_prefix(input_ids, labels) if share_prefix else 0
    cache = None
    if shared:
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(input_ids))
    targets = labels[:, shared + 1 :]
    learnt = targets != IGNORED
    return _hidden_states(model, learnt, input_ids[:, shared:], cache, position_ids), targets[learnt]


def orthogonality_penalty(model: torch.nn.Module) -> Tensor | None:
    """Return AdaLoRA's weighted regularisation, which PEFT adds only to the model's own loss, or None for other
    adapters.

    Its singular vectors are free matrices that are pulled towards orthogonality (Zhang et al. 2023, eq. 4).
    PEFT's own code computes the penalty here, around a model that only returns a loss of 0.
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
) -> Tensor:
    """Return the output head's inputs at the positions before learnt tokens, with shape [number of learnt
    tokens, width].

    `logits_to_keep` would score the same positions in all rows, up to ten times as many, because rows end at
    different positions. The output of the head is not used here.

    Args:
        learnt: [batch, length - 1], true if the next token is learnt.
    """
    selected: list[Tensor] = []

    def select(decoder: torch.nn.Module, inputs: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
        selected.append(output.last_hidden_state[:, :-1][learnt])
        output.last_hidden_state = output.last_hidden_state[:1, :1]  # with no row PyTorch copies the head's weights
        return output

    hook = _decoder(model).register_forward_hook(select)
    try:
        model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, position_ids=position_ids)
    finally:
        hook.remove()
    return selected[0]


def _summed_cross_entropy(
    model: PreTrainedModel | PeftModel, hidden: Tensor, targets: Tensor, logits_at_once: int
) -> Tensor:
    """Return the cross entropy summed over the given positions, in nats.

    Long answers are scored in parts, and the logits of a part are computed again for its gradient, so that
    the logits of all positions are never in memory together.

    Args:
        hidden: [positions, width], from `_hidden_states`.
        targets: [positions], token ids.
        logits_at_once: maximum number of logits in memory, positions times vocabulary.
    """
    size = max(1, logits_at_once // model.config.get_text_config().vocab_size)
    if len(hidden) <= size:
        return _cross_entropy(model, hidden, targets)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    losses = [checkpoint(_cross_entropy, model, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum()


def _cross_entropy(model: PreTrainedModel | PeftModel, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(_logits(model, hidden), targets, reduction="sum")


def _logits(model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
    """Compute the logits with the model's own forward pass, since some models scale or cap logits, or scale
    hidden states.

    Args:
        hidden: [positions, width], from `_hidden_states`.

    Returns:
        [positions, vocabulary], in float32.
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
    """Return the underlying model, which contains the adapter's layers."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


class _DecoderOutput(MoeModelOutputWithPast):
    """A decoder output that holds hidden states, and None for every other attribute."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _forward_replaced(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """Make a module return the given output for every input during the `with` block."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def shared_prefix(input_ids: Tensor, labels: Tensor) -> int:
    """Return the length of the rows' common prefix that predicts no answer token, or 0 for one row or a short
    prefix.

    Args:
        input_ids: [batch, length].
        labels: [batch, length], -100 at positions that are not learnt.
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
    """Return whether keys and values can be shared. Checkpointed layers cannot share them, because they run
    without a cache.
    """
    return not _without_adapter(model).is_gradient_checkpointing and keeps_all_keys(model.config)


def keeps_all_keys(config: PreTrainedConfig) -> bool:
    """Return whether all layers attend to all earlier positions, with no sliding window and no recurrent state."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
