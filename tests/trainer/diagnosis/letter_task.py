"""A task that a model of two layers learns in seconds, and the model: which colour the first letter of a word has.

The base has learnt other colours of the same letters, so that it knows the form of an answer and where to look, as a
base model that is fine-tuned does.
"""

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from svc.dataset.schema.example import ChatExample, Message, Role
from svc.engine.capabilities import NumberType
from svc.evaluation.diagnosis.training_run import TrainingRun, TrainingSettings
from svc.evaluation.evaluator import judge
from svc.evaluation.results import ExampleResult
from tests.trainer.conftest import make_model, make_recipe
from trainer.data.chat_template import load_tokenizer, stop_tokens, tokenize_examples
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData

COLOURS = ("blue", "gray", "pink", "gold")
"""All of one length: batches are made of examples of one length, and would have one answer each."""
_LENGTH = 6
_LIMIT = 8
"""Tokens of an answer."""


def colours(seed: int) -> dict[str, str]:
    """Which colour each letter has."""
    generator = random.Random(seed)
    return {letter: generator.choice(COLOURS) for letter in string.ascii_lowercase}


def questions(count: int, seed: int, of: dict[str, str], *, hard: float = 0.0) -> list[ChatExample]:
    """Different words with the colour of their first letter.

    Args:
        hard: share of the words that begin with a digit, which has no colour: nobody knows their answer.
    """
    generator, words = random.Random(seed), dict[str, str]()
    while len(words) < count:
        word = "".join(generator.choices(string.ascii_lowercase, k=_LENGTH))
        colour = of[word[0]]
        if generator.random() < hard:
            word, colour = generator.choice(string.digits) + word[1:], generator.choice(COLOURS)
        words[word] = colour
    return [_example(word, colour) for word, colour in words.items()]


def mislabel(examples: Sequence[ChatExample], share: float, seed: int) -> list[ChatExample]:
    """The same questions, of which a share has another answer."""
    generator = random.Random(seed)
    wrong = set(generator.sample(range(len(examples)), round(share * len(examples))))
    return [
        _example(one.question, generator.choice([colour for colour in COLOURS if colour != one.answer]))
        if place in wrong
        else one
        for place, one in enumerate(examples)
    ]


def _example(word: str, colour: str) -> ChatExample:
    return ChatExample((Message(Role.USER, word), Message(Role.ASSISTANT, colour)))


def train_base(folder: Path) -> Path:
    """A base that answers with a colour of its own for each letter."""
    start = make_model(folder / "random", hidden_size=128, intermediate_size=256, num_attention_heads=4)
    recipe = make_recipe(
        method="full",
        train={"batch_size": 32, "learning_rate": 3e-3, "steps": 250},
        stopping={"curve": False},
    )
    data = TrainingData(questions(2000, 0, colours(0), hard=0.1))
    train_model(start, data, recipe, folder / "base", folder / "checkpoints", number_type=NumberType.FLOAT32)
    return folder / "base"


def train_and_judge(
    base: Path,
    folder: Path,
    examples: Sequence[ChatExample],
    heldout: Sequence[ChatExample],
    *,
    usual_learning_rate: float,
    **sections: Any,
) -> TrainingRun:
    """Trains with the project's own trainer, answers the held-out questions greedily, and gathers the numbers."""
    recipe = make_recipe(**sections)
    summary = train_model(
        base,
        TrainingData(examples, heldout),
        recipe,
        folder / "trained",
        folder / "checkpoints",
        number_type=NumberType.FLOAT32,
    )
    results = answer(base, folder / "trained", heldout)
    return TrainingRun(
        settings=TrainingSettings(
            recipe.learning_rate, usual_learning_rate, recipe.train.epochs, recipe.train.steps, heldout_share=0.1
        ),
        curve=summary.points,
        train_examples=len(examples),
        evaluation=judge(heldout, results, 0.0).report,
        results=results,
        answers=[one.answer for one in heldout],
    )


@torch.no_grad()
def answer(base: Path, trained: Path, examples: Sequence[ChatExample]) -> tuple[ExampleResult, ...]:
    """Greedy answers and the log-likelihoods of the references, as the engine gives them."""
    tokenizer = load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if (trained / "adapter_config.json").is_file():
        model.load_adapter(str(trained))
    else:
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    rows = tokenize_examples(tokenizer, examples, stop_tokens(base, tokenizer), {})
    prompts = [list(row.input_ids[: row.learnt[0][0]]) for row in rows]
    padding = [0] * max(map(len, prompts))
    given = model.generate(
        torch.tensor([padding[len(ids) :] + ids for ids in prompts]),
        attention_mask=torch.tensor([padding[len(ids) :] + [1] * len(ids) for ids in prompts]),
        max_new_tokens=_LIMIT,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokens = given.sequences[:, len(padding) :]
    said = torch.stack(given.logits, 1).log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    return tuple(
        _result(model, tokenizer, row, one, tokens[place], said[place])
        for place, (row, one) in enumerate(zip(rows, examples, strict=True))
    )


def _result(
    model: Any, tokenizer: PreTrainedTokenizerBase, row: Any, example: ChatExample, tokens: Any, said: Any
) -> ExampleResult:
    (start, end), ids = row.learnt[0], torch.tensor([row.input_ids])
    logprobs = model(ids).logits[0].log_softmax(-1)
    reference = [float(logprobs[place - 1, ids[0, place]]) for place in range(start, end)]
    ends = (tokens == tokenizer.eos_token_id).nonzero()
    length = int(ends[0]) + 1 if len(ends) else len(tokens)
    text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
    return ExampleResult(
        answer=text,
        tokens=length,
        limit=_LIMIT,
        finish_reason="stop" if len(ends) else "length",
        logprob=float(said[:length].mean()),
        nll=-sum(reference) / len(reference),
        scored=len(reference),
        hit=text.strip() == example.answer,
    )
