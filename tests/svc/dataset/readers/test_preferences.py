"""Tests that preference pairs and labelled answers are read in the formats of published data sets.

The rows have the keys, the order of keys and the quirks of these sets; their texts are ours.
"""

from pathlib import Path
from typing import Any

import pytest

from svc.dataset.readers.preferences import read_labelled, read_pairs
from svc.dataset.schema.example import ChatExample, Message, Role
from svc.dataset.schema.preference import LabelledAnswer, PreferencePair
from tests.svc.chats import chat, turn, write_lines

QUESTION, BETTER, WORSE = "Name a red fruit.", "A cherry.", "Bananas are yellow."
PAIR = PreferencePair(chat(QUESTION, BETTER), chat(QUESTION, WORSE))
ASKED, GOOD, BAD = turn("user", QUESTION), turn("assistant", BETTER), turn("assistant", WORSE)


def ordered(role: str, content: str) -> dict[str, Any]:
    """Return a turn with its keys in the order of Arrow files."""
    return {"content": content, "role": role}


def with_system(pair: PreferencePair, text: str) -> PreferencePair:
    system = Message(Role.SYSTEM, text)
    chosen, rejected = (ChatExample((system, *side.messages), side.tools) for side in (pair.chosen, pair.rejected))
    return PreferencePair(chosen, rejected)


ULTRAFEEDBACK = {
    "prompt": QUESTION,
    "prompt_id": "6f8ea6bb2c9b0f3e1a2b",
    "chosen": [ordered("user", QUESTION), ordered("assistant", BETTER)],
    "rejected": [ordered("user", QUESTION), ordered("assistant", WORSE)],
    "messages": [ordered("user", QUESTION), ordered("assistant", BETTER)],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
HH = {
    "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {BETTER}",
    "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {WORSE}",
}
OPENAI = {
    "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [GOOD],
    "non_preferred_output": [BAD],
}
LLAMA_FACTORY = {
    "conversations": [{"from": "human", "value": QUESTION}],
    "chosen": {"from": "gpt", "value": BETTER},
    "rejected": {"from": "gpt", "value": WORSE},
}
PUBLISHED = {
    "TRL, texts": {"prompt": QUESTION, "chosen": BETTER, "rejected": WORSE},
    "TRL, turns": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, implicit prompt": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "UltraFeedback": ULTRAFEEDBACK,
    "UltraFeedback, cleaned by Argilla": {
        "source": "evol_instruct",
        "prompt": QUESTION,
        "chosen": [ordered("user", QUESTION), ordered("assistant", BETTER)],
        "chosen-rating": 5.0,
        "chosen-model": "gpt-4",
        "rejected": [ordered("user", QUESTION), ordered("assistant", WORSE)],
        "rejected-rating": 2.5,
        "rejected-model": "alpaca-7b",
    },
    "ORPO mix": {
        "source": "Airoboros",
        "chosen": [ordered("user", QUESTION), ordered("assistant", BETTER)],
        "rejected": [ordered("user", QUESTION), ordered("assistant", WORSE)],
        "prompt": QUESTION,
        "question": QUESTION,
    },
    "Anthropic HH": HH,
    "Anthropic HH, prompt split off": {
        "prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:",
        "response": f" {BETTER}",
        "chosen": f" {BETTER}",
        "rejected": f" {WORSE}",
    },
    "LLaMA-Factory, ShareGPT": LLAMA_FACTORY,
    "LLaMA-Factory, Alpaca": {"instruction": QUESTION, "input": "", "chosen": BETTER, "rejected": WORSE},
    "Orca, read by Axolotl's chatml.intel": {"system": "", "question": QUESTION, "chosen": BETTER, "rejected": WORSE},
    "Argilla's Orca, read by Axolotl's chatml.icr": {
        "system": "",
        "input": QUESTION,
        "chosen": BETTER,
        "rejected": WORSE,
        "generations": [BETTER, WORSE],
        "status": "ok",
    },
    "Axolotl's chat_template.default": {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
    "Capybara, sampled": {"messages": [ASKED], "chosen": BETTER, "rejected": WORSE},
    "OpenAI": OPENAI,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_pair_is_read_from_every_published_format(tmp_path: Path, name: str) -> None:
    assert read_pairs(write_lines(tmp_path / "x.jsonl", PUBLISHED[name])) == [PAIR]


def test_pair_gives_a_desirable_and_an_undesirable_answer_when_labels_are_needed(tmp_path: Path) -> None:
    answers = read_labelled(write_lines(tmp_path / "x.jsonl", ULTRAFEEDBACK))
    assert answers == [LabelledAnswer(PAIR.chosen, desirable=True), LabelledAnswer(PAIR.rejected, desirable=False)]
