"""Asks a judge, a model at any OpenAI-compatible endpoint, which of two answers is better.

Prompts, references and answers are sent to that endpoint, so judging is off by default, and the destination is printed
before anything is sent. Judges tend to favor the first answer, so each pair is judged in both orders. The report says
how often the two verdicts agree.
"""

import asyncio
import re
from collections.abc import Sequence
from enum import StrEnum
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tool_calls import answer_text
from svc.errors import EngineError, JudgeError
from svc.evaluation.endpoint import CONCURRENCY, Chat, Endpoint, all_or_none
from svc.evaluation.intervals import Interval, mean, proportion
from svc.terminal import console, counting

_MAX_UNREAD_SHARE = 0.1
"""Maximum share of pairs without a readable verdict."""
_LAST_WORD = re.compile(r"\b(A|B|TIE)\W*$")
_INSTRUCTION = """\
You compare two answers to the same conversation. Say which one serves the user better: is it right, does it do what \
was asked, is it complete without being longer than it must be. The order in which they stand means nothing. Reply \
with one word and nothing else: A, B, or TIE if neither is better."""


class Preference(StrEnum):
    """A verdict on which answer of a pair is better."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"


_OPPOSITE = {Preference.FIRST: Preference.SECOND, Preference.SECOND: Preference.FIRST, Preference.TIE: Preference.TIE}
_POINTS = {Preference.FIRST: 0.0, Preference.TIE: 0.5, Preference.SECOND: 1.0}


class JudgeReport(BaseModel):
    """A judge's verdicts on the answers of two models, and the resulting figures.

    Attributes:
        url, model: the judge's endpoint and model.
        pairs: number of pairs with a readable verdict in both orders.
        unread: number of all other pairs, which are excluded from all figures.
        win_rate: win rate of the second model, averaged over pairs and orders. A win counts 1 and a tie 0.5.
        agreement: share of pairs with the same verdict in both orders.
        verdicts: the two verdicts on each pair, or an empty tuple if either is unreadable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    model: str
    pairs: int
    unread: int
    win_rate: Interval
    agreement: Interval
    verdicts: tuple[tuple[Preference, ...], ...]


async def judge_answers(
    endpoint: Endpoint,
    examples: Sequence[ChatExample],
    first: Sequence[str],
    second: Sequence[str],
    *,
    title: str,
) -> JudgeReport:
    """Have a judge compare all pairs of answers in both orders. Identical answers are ties and are not sent.

    Args:
        first, second: the answers of the two models to each example.
        title: text to show next to the progress bar.

    Raises:
        SettingsError: the endpoint is not valid.
        JudgeError: the judge did not respond, rejected a request, or returned too few verdicts.
    """
    endpoint.check()
    asked = sum(one.strip() != other.strip() for one, other in zip(first, second, strict=True))
    console.print(
        f"  sending {asked} prompts, each with its reference and both answers, to the judge {endpoint.model} at "
        f"{endpoint.url}",
        markup=False,
        soft_wrap=True,
    )
    pairs = asyncio.Semaphore(CONCURRENCY)  # both orders of a pair come before the next: progress counts pairs
    with counting(title, len(first)) as advance:
        async with endpoint.chat() as chat:

            async def compare(example: ChatExample, one: str, other: str) -> tuple[Preference, ...]:
                async with pairs:
                    verdicts = await _compare(chat, example, one, other)
                advance()
                return verdicts

            try:
                verdicts = await all_or_none(map(compare, examples, first, second))
            except EngineError as error:
                raise JudgeError(
                    f"a request to the judge failed: {error.wrong}",
                    expected=error.expected,
                    todo="check judge.url, judge.model and judge.key_file",
                ) from error
    return _report(endpoint, verdicts)


async def _compare(chat: Chat, example: ChatExample, first: str, second: str) -> tuple[Preference, ...]:
    """Judge one pair of answers in both orders.

    Both verdicts are expressed in terms of `first` and `second`. The result is empty if either verdict cannot be read.
    """
    if first.strip() == second.strip():
        return Preference.TIE, Preference.TIE
    shown, turned = await _ask(chat, example, first, second), await _ask(chat, example, second, first)
    return (shown, _OPPOSITE[turned]) if shown and turned else ()


async def _ask(chat: Chat, example: ChatExample, first: str, second: str) -> Preference | None:
    turns = [(message.role, answer_text(message.content, message.tool_calls)) for message in example.prompt]
    conversation = "\n\n".join(f"[{role}]\n{text}" for role, text in turns)
    parts = {"Conversation": conversation, "A right answer": example.answer, "Answer A": first, "Answer B": second}
    question = "\n\n".join(f"# {title}\n\n{text}" for title, text in parts.items())
    messages = [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": question}]
    return _read_verdict((await chat.complete(messages)).text)


def _read_verdict(text: str) -> Preference | None:
    """Return the verdict in the judge's answer, or None if there is none.

    The verdict must be the only word, or the last word after an explanation.
    """
    match = _LAST_WORD.fullmatch(text.strip(" \n*_\"'").upper()) or _LAST_WORD.search(text)
    named = {"A": Preference.FIRST, "B": Preference.SECOND, "TIE": Preference.TIE}
    return named[match[1]] if match else None


def _report(endpoint: Endpoint, verdicts: Sequence[tuple[Preference, ...]]) -> JudgeReport:
    read = [both for both in verdicts if both]
    unread = len(verdicts) - len(read)
    if not read or unread > _MAX_UNREAD_SHARE * len(verdicts):
        raise JudgeError(
            f"judge {endpoint.model} returned no verdict for {unread} of {len(verdicts)} pairs",
            expected="A, B or TIE",
            todo="set judge.model to a model that follows instructions",
        )
    return JudgeReport(
        url=endpoint.url,
        model=endpoint.model,
        pairs=len(read),
        unread=unread,
        win_rate=mean([fmean(_POINTS[verdict] for verdict in both) for both in read]),
        agreement=proportion(sum(one is other for one, other in read), len(read)),
        verdicts=tuple(verdicts),
    )
