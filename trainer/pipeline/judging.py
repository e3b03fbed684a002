"""The model that a recipe names as its judge: where it is, and what it says of the merged model beside the base."""

import asyncio
from collections.abc import Sequence

from svc.dataset.schema.example import ChatExample
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.judge import JudgeReport, judge_answers
from svc.evaluation.results import ExampleResult
from svc.identity.key_file import read_secret
from trainer.recipe.sections import Judge


def judge_endpoint(judge: Judge) -> Endpoint | None:
    """Where the recipe's judge is; None where it names none.

    Raises:
        SettingsError: it is no endpoint, or others can read the file of its key.
    """
    if judge.url is None or judge.model is None:
        return None
    key = read_secret(judge.key_file, "ask for another one") if judge.key_file else None
    endpoint = Endpoint(judge.url, judge.model, key)
    endpoint.check()
    return endpoint


def compare_answers(
    judge: Judge, heldout: Sequence[ChatExample], base: Sequence[ExampleResult], merged: Sequence[ExampleResult]
) -> JudgeReport:
    """What the judge says of the merged model's answers beside the base's.

    Args:
        judge: names one.
        heldout: all examples; the first ones were answered.

    Raises:
        SvcError: the judge cannot be asked, or gives no verdicts.
    """
    endpoint = judge_endpoint(judge)
    assert endpoint is not None  # noqa: S101 - whoever calls knows that one is named
    before, after = ([result.answer for result in results] for results in (base, merged))
    asked = heldout[: len(before)]
    return asyncio.run(judge_answers(endpoint, asked, before, after, title="judging merged beside base"))
