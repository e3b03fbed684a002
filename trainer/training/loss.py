"""TRL's trainer with a loss that a CPU can afford: shared prompts once, the head at answer positions only.

On the CPU TRL scores every position and computes entropy over the vocabulary; on other devices its own loss already
scores answer positions alone, and is used as it is where its logits are the model's. There is no state but the
trainer's own, so that a checkpoint goes on as if nothing had been. Imports torch and TRL.
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

_WORTH_SHARING = 16  # tokens; a shorter prefix does not repay a second pass through the model
_LOGITS_AT_ONCE = 2**26  # 256 MiB in float32, and as much for their gradient
_TRIED, _LARGEST_TRIED = 16, 100.0  # hidden states on which TRL's head is tried, and the largest logit that they give


class AnswerTrainer(SFTTrainer):
    """`SFTTrainer` on examples of `input_ids` and `labels`, padded on the right."""

    aux_loss_enabled: bool  # TRL's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        on_cpu, config = self.args.device.type == "cpu", self.model.config.get_text_config()
        name_experts(config)
        if self.aux_loss_enabled and not count_experts(config):  # Granite 4's small ones are mixtures in name alone
            self.aux_loss_enabled, config.output_router_logits = False, False
        # A mixture of experts has a second loss, that TRL adds. TRL's head is right for each of them.
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
        """Mean cross entropy of the answer tokens, nats; with AdaLoRA, its regularisation added.

        Raises:
            TrainingError: the loss is not finite.
        """
        input_ids, labels, positions = inputs["input_ids"], inputs["labels"], inputs.get("position_ids")
        # With FlashAttention TRL keeps packed examples apart; without, only the mask that follows from positions does.
        packed = positions is not None and not self.padding_free
        outputs = None
        if return_outputs or self.aux_loss_enabled or not (self._scores_answers or packed):
            if packed:
                del inputs["attention_mask"]  # with one, transformers does not look for the examples in a row
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if return_outputs else (result, None)
        else:
            answer_tokens = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            # NEFTune's noise is scaled by the length of what goes through the model at once.
            share = self.args.neftune_noise_alpha is None
            loss = answer_loss(model, input_ids, labels, positions, share_prefix=share) / answer_tokens
        penalty = orthogonality_penalty(self.model)
        if penalty is not None and model.training:
            # Like TRL's second losses: the sum over accumulated batches is taken, so each brings its share.
            loss = loss + penalty / (self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1)
        if not torch.isfinite(loss):
            raise diverged(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}",
                self.args.learning_rate,
                first_in_float16=self.args.fp16 and self.state.global_step == 0,
            )
        return (loss, outputs) if return_outputs else loss


def fused_head_is_right(model: PreTrainedModel | PeftModel) -> bool:
    """Whether TRL's head gives the log-probabilities that the model's own forward gives.

    TRL multiplies hidden states by the head's weights itself, and knows by their names in a config what most models do
    to logits: Granite's and Cohere's scale, Gemma's soft cap. What it does not know, as RecurrentGemma's cap and
    Inkling's scale, it leaves out without a word. Hidden states that give logits of up to 100 tell the two apart, which
    is far above the roundings of any number type.

    Args:
        model: to which TRL has added its head.
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
    """Cross entropy summed over the answer tokens, nats.

    What all prompts of the batch begin with, as a system prompt, goes through the model once and is attended to from
    its keys and values; the gradient flows back through them, so that this is the loss of the whole batch. Padding
    needs no mask: it stands on the right, and attention is causal.

    Args:
        input_ids: [batch, length].
        labels: [batch, length]; the token id where it is to be learnt, anywhere in a row, else -100.
        position_ids: [batch, length]; of packed rows, where they begin anew with each example.
        share_prefix: false takes every row by itself.
    """
    hidden, targets = _before_answers(model, input_ids, labels, position_ids, share_prefix=share_prefix)
    return _summed_cross_entropy(model, hidden, targets, _LOGITS_AT_ONCE)


def answer_token_losses(
    model: PreTrainedModel | PeftModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Cross entropy of each answer token, nats, row after row; without a gradient. Arguments as of `answer_loss`."""
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
    """Hidden states before the answer tokens, and these tokens."""
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
    """AdaLoRA's weighted regularisation, that PEFT adds only to a loss that the model computes; None for others.

    Its singular vectors are free matrices that are pulled towards orthogonality (Zhang et al. 2023, eq. 4). PEFT's own
    code computes it here, around a model that does nothing but return a loss of 0.
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
    """What the model makes logits of at the positions before learnt tokens, [number of them, width].

    `logits_to_keep` would score the same positions for all rows, or ten times as many: rows end at different places.
    What the head itself gives here is not used.

    Args:
        learnt: [batch, length - 1], true where the next token is learnt.
    """
    found: list[Tensor] = []

    def select(decoder: torch.nn.Module, inputs: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
        found.append(output.last_hidden_state[:, :-1][learnt])
        output.last_hidden_state = output.last_hidden_state[:1, :1]  # for none PyTorch copies the head's weights
        return output

    hook = _decoder(model).register_forward_hook(select)
    try:
        model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, position_ids=position_ids)
    finally:
        hook.remove()
    return found[0]


def _summed_cross_entropy(
    model: PreTrainedModel | PeftModel, hidden: Tensor, targets: Tensor, logits_at_once: int
) -> Tensor:
    """Cross entropy at these positions, summed.

    Long answers are scored in parts, and the logits of a part are computed again for its gradient, so that they never
    stand in memory for all positions.

    Args:
        hidden: [positions, width], as `_hidden_states` has it.
        targets: [positions], token ids.
        logits_at_once: positions times vocabulary.
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
    """The model's own forward makes them: some models scale or cap them, or scale what they are made of.

    Args:
        hidden: [positions, width], as `_hidden_states` has it.

    Returns:
        [positions, vocabulary], in float32.
    """
    nothing = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
    with _forward_replaced(_decoder(model), _DecoderOutput(last_hidden_state=hidden.unsqueeze(dim=0))):
        logits: Tensor = model(input_ids=nothing, use_cache=False).logits
    return logits[0].float()


def _decoder(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """The part of the model that gives what logits are made of."""
    base = _without_adapter(model)
    decoder = base.get_decoder()
    # transformers names a part of the head for ModernBERT's, and the whole for Llama 4's.
    found: torch.nn.Module = decoder if isinstance(decoder, PreTrainedModel) and decoder is not base else base.model
    return found


def _without_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that the adapter's layers are in."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


class _DecoderOutput(MoeModelOutputWithPast):
    """Hidden states, and None for whatever else a model takes from its decoder."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _forward_replaced(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """Inside, the module returns this, whatever it is given."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def shared_prefix(input_ids: Tensor, labels: Tensor) -> int:
    """Tokens that all rows begin with and that predict no answer token; 0 for a single row, and where it does not pay.

    Args:
        input_ids: [batch, length].
        labels: [batch, length], -100 where nothing is to be learnt.
    """
    if len(input_ids) < 2:
        return 0
    differs = (input_ids != input_ids[:1]).any(dim=0)
    predicts = torch.zeros_like(differs)
    predicts[:-1] = (labels[:, 1:] != IGNORED).any(dim=0)
    ends = (differs | predicts).nonzero()
    shared = int(ends[0]) if len(ends) else 0
    return shared if shared >= _WORTH_SHARING else 0


def _can_share(model: PreTrainedModel | PeftModel) -> bool:
    """Whether keys and values can be shared: not with checkpointed layers, which are run without a cache."""
    return not _without_adapter(model).is_gradient_checkpointing and keeps_all_keys(model.config)


def keeps_all_keys(config: PreTrainedConfig) -> bool:
    """Whether every layer attends to all earlier positions: a sliding window or a recurrent state cannot be shared."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
