"""Tests that the cheap loss equals the full loss: labels anywhere, in parts, other models and adapters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    set_seed,
)

from trainer.data.chat_template import IGNORED
from trainer.training import loss
from trainer.training.loss import answer_loss, orthogonality_penalty

VOCABULARY = 50
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = LlamaForCausalLM(LlamaConfig(**SHAPE)).float()


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw right-padded rows with a common prefix. Any token may be learned."""
    tokens, learnt = st.integers(0, VOCABULARY - 1), st.booleans()
    prefix = draw(st.lists(tokens, max_size=24))
    rows = draw(st.lists(st.lists(st.tuples(tokens, learnt), min_size=2, max_size=8), min_size=1, max_size=4))
    length = len(prefix) + max(len(row) for row in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), IGNORED)
    for number, row in enumerate(rows):
        ids[number, : len(prefix)] = torch.tensor(prefix)
        for place, (token, is_learnt) in enumerate(row, start=len(prefix)):
            ids[number, place] = token
            labels[number, place] = token if is_learnt else IGNORED
    return ids, labels


def batch(rows: int = 4, length: int = 40, shared: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows with two learned spans that follow a shared prompt."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, :shared] = ids[0, :shared]
    labels = torch.full_like(ids, IGNORED)
    for part in (slice(shared + 3, shared + 7), slice(length - 6, length)):
        labels[:, part] = ids[:, part]
    return ids, labels


def whole_loss(model: PreTrainedModel | PeftModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the textbook loss, with logits at every position and padding masked only by the labels."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, learnt, allow_unused=False)])


def assert_same(model: PreTrainedModel | PeftModel) -> None:
    """Check that the loss and gradients of both computations are equal."""
    cheap, real = (loss(model, *batch()) for loss in (answer_loss, whole_loss))
    torch.testing.assert_close(cheap, real, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient(cheap, model), gradient(real, model), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(batches())
def test_answer_loss_is_correct_for_labels_at_any_position(labeled: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(answer_loss(LLAMA, *labeled), whole_loss(LLAMA, *labeled), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(batches(), st.integers(1, 5))
def test_answer_loss_is_unchanged_when_computed_in_chunks(
    labeled: tuple[torch.Tensor, torch.Tensor], positions: int
) -> None:
    hidden = torch.randn(12, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(12)
    whole, parts = (loss._summed_cross_entropy(LLAMA, hidden, targets, size * VOCABULARY) for size in (12, positions))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (parts, whole)))


def test_logits_of_long_answers_are_computed_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_LOGITS_AT_ONCE", 4 * VOCABULARY)
    scored: list[int] = []
    hook = LLAMA.lm_head.register_forward_hook(lambda head, inputs, output: scored.append(output.shape[1]))
    answer_loss(LLAMA, *batch()).backward()
    hook.remove()
    assert max(scored) == 4


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16, sliding_window=4, final_logit_softcapping=2.0)),
        Phi3ForCausalLM(Phi3Config(**SHAPE)),
        CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
        GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
        MiniCPM3ForCausalLM(MiniCPM3Config(**SHAPE | {"num_key_value_heads": 2}, dim_model_base=4)),
        Gemma4ForCausalLM(Gemma4TextConfig(**SHAPE, hidden_size_per_layer_input=8, vocab_size_per_layer_input=50)),
        GPT2LMHeadModel(GPT2Config(**SHAPE, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)),
        OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)),
    ],
    ids=[
        "sliding window and capped logits",
        "fused projections",
        "scaled logits",
        "divided logits",
        "scaled hidden states",
        "keys shared between layers",
        "cross attentions in its output",
        "a decoder in the decoder",
    ],
)
def test_answer_loss_matches_the_full_loss_for_every_tested_architecture(model: PreTrainedModel) -> None:
    assert_same(model.float())


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
        LoraConfig(target_modules="all-linear", init_lora_weights=False, use_dora=True),
        VeraConfig(target_modules=["q_proj", "o_proj"], r=4, init_weights=False),
        AdaLoraConfig(target_modules="all-linear", init_lora_weights=False, total_step=10),
    ],
    ids=lambda adapter: f"{type(adapter).__name__}{'-DoRA' if getattr(adapter, 'use_dora', False) else ''}",
)
def test_answer_loss_matches_the_full_loss_for_every_adapter_type(adapter: PeftConfig) -> None:
    set_seed(0)
    adapter.task_type = "CAUSAL_LM"
    assert_same(get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), adapter))


def test_answer_loss_is_unchanged_by_gradient_checkpointing() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    model.gradient_checkpointing_enable()
    assert_same(model)


def test_adalora_penalty_equals_the_penalty_in_the_peft_loss() -> None:
    set_seed(0)
    adapter = AdaLoraConfig(target_modules="all-linear", total_step=10, task_type="CAUSAL_LM", orth_reg_weight=0.3)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), adapter)
    ids, labels = batch()
    with_it = model(input_ids=ids, labels=labels, use_cache=False).loss
    without = whole_loss(model, ids, labels) / (labels[:, 1:] != IGNORED).sum()
    penalty = orthogonality_penalty(model)
    assert penalty is not None
    torch.testing.assert_close(penalty, with_it - without, rtol=1e-3, atol=1e-4)


def test_lora_adapter_has_no_orthogonality_penalty() -> None:
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), LoraConfig(target_modules="all-linear"))
    assert orthogonality_penalty(model) is None
