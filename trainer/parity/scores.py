"""What the trainer's own models find of held-out answers, token by token: base with adapter, and the merged model.

In transformers, with the adapter beside the base and not in it: the model that training had. Imports torch.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.capabilities import NumberType
from svc.evaluation.token_scores import Scores, TokenScore
from trainer.model.attention import attention_implementation


def load(folder: Path, number_type: NumberType) -> PreTrainedModel:
    """A model folder's weights, where this machine computes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, number_type),
        attn_implementation=attention_implementation(AutoConfig.from_pretrained(folder)),
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def score(model: torch.nn.Module, examples: Sequence[TokenizedExample]) -> Scores:
    """What a model finds of the examples' answers.

    Args:
        model: takes token ids, and `logits_to_keep` as transformers' models do.
    """
    device = next(model.parameters()).device
    return tuple(tuple(example.of_learnt(_score(model, example, device))) for example in examples)


def _score(model: torch.nn.Module, example: TokenizedExample, device: torch.device) -> list[TokenScore]:
    first = example.learnt[0][0]
    ids = torch.tensor([example.input_ids], device=device)
    # The logits that predict a token stand before it, and those at the end predict none.
    logits = model(input_ids=ids, logits_to_keep=len(example.input_ids) - first + 1).logits[0, :-1].float()
    logprobs = logits.log_softmax(dim=-1)
    of_tokens = logprobs.gather(1, ids[0, first:, None])[:, 0]
    return [
        TokenScore(float(logprob), int(likeliest))
        for logprob, likeliest in zip(of_tokens.tolist(), logprobs.argmax(dim=-1).tolist(), strict=True)
    ]
