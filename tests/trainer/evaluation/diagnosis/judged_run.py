"""Runs one training without an engine and returns the numbers that its diagnosis reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.evaluation.evaluator import score_answers
from svc.evaluation.results import ExampleResult
from tests.trainer.conftest import make_recipe
from trainer.data.chat_template import load_tokenizer, stop_tokens, tokenize_examples
from trainer.evaluation.diagnosis.training_run import TrainingRun
from trainer.model.config import read_width
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData

_AT_ONCE = 20
"""Number of questions answered in one batch."""


def train_and_judge(
    base: Path,
    folder: Path,
    examples: Sequence[ChatExample],
    heldout: Sequence[ChatExample],
    *,
    usual_learning_rate: float | None = None,
    number_type: NumberType = NumberType.FLOAT32,
    max_tokens: int = 8,
    **sections: Any,
) -> TrainingRun:
    """Train, answer the held-out questions greedily, and return the numbers for the diagnosis.

    Args:
        usual_learning_rate: usual learning rate, or None for the default of the method and base.
        max_tokens: maximum number of tokens in an answer.
        sections: sections of the recipe.
    """
    recipe, width = make_recipe(**sections), read_width(base)
    summary = train_model(
        base,
        TrainingData(examples, heldout),
        recipe,
        folder / "trained",
        folder / "checkpoints",
        number_type=number_type,
    )
    results = answer(base, folder / "trained", heldout, number_type=number_type, max_tokens=max_tokens)
    return TrainingRun(
        recipe=recipe.changed({"data.heldout": None, "train.learning_rate": recipe.learning_rate(width)}),
        usual_learning_rate=usual_learning_rate or recipe.usual_learning_rate(width),
        curve=summary.points,
        train_examples=len(examples),
        evaluation=score_answers(heldout, results, 0.0).report,
        results=results,
        answers=[example.answer for example in heldout],
    )


@torch.no_grad()
def answer(
    base: Path, trained: Path, examples: Sequence[ChatExample], *, number_type: NumberType, max_tokens: int
) -> tuple[ExampleResult, ...]:
    """Return greedy answers and the log-likelihoods of the references, as the engine would."""
    tokenizer, dtype = load_tokenizer(base), getattr(torch, number_type)
    if (trained / "adapter_config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model.load_adapter(str(trained))
    else:
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=dtype)
    rows = tokenize_examples(tokenizer, examples, stop_tokens(base, tokenizer), {})
    results: list[ExampleResult] = []
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        tokens, logprobs = _generate(model, tokenizer, part, max_tokens)
        results += [
            _result(model, tokenizer, row, example, tokens[place], logprobs[place], max_tokens)
            for place, (row, example) in enumerate(zip(part, examples[start:], strict=False))
        ]
    return tuple(results)


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], max_tokens: int) -> tuple[Any, Any]:
    """Return the tokens of greedy answers and their log-probabilities."""
    prompts = [list(row.input_ids[: row.learnt[0][0]]) for row in rows]
    padding = [0] * max(map(len, prompts))
    given = model.generate(
        torch.tensor([padding[len(ids) :] + ids for ids in prompts]),
        attention_mask=torch.tensor([padding[len(ids) :] + [1] * len(ids) for ids in prompts]),
        max_new_tokens=max_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokens = given.sequences[:, len(padding) :]
    return tokens, torch.stack(given.logits, 1).float().log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)


def _result(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    row: Any,
    example: ChatExample,
    tokens: Any,
    answer_logprobs: Any,
    limit: int,
) -> ExampleResult:
    (start, end), ids = row.learnt[0], torch.tensor([row.input_ids])
    logprobs = model(ids).logits[0].float().log_softmax(-1)
    reference = [float(logprobs[place - 1, ids[0, place]]) for place in range(start, end)]
    ends = (tokens == tokenizer.eos_token_id).nonzero()
    length = int(ends[0]) + 1 if len(ends) else len(tokens)
    text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
    return ExampleResult(
        answer=text,
        tokens=length,
        limit=limit,
        finish_reason="stop" if len(ends) else "length",
        logprob=float(answer_logprobs[:length].mean()),
        nll=-sum(reference) / len(reference),
        scored=len(reference),
        hit=text.strip() == example.answer,
    )
