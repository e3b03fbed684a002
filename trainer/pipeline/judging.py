"""Uses the judge that a recipe names: finds its endpoint, and lets it compare the merged model with the
base.
"""

import asyncio
from collections.abc import Sequence

from svc.dataset.schema.example import ChatExample
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.judge import JudgeReport, judge_answers
from svc.evaluation.results import ExampleResult
from svc.identity.key_file import read_secret
from trainer.recipe.evaluate import Judge


def judge_endpoint(judge: Judge) -> Endpoint | None:
    """Return the endpoint of the recipe's judge, or None if the recipe names no judge.

    Raises:
        SettingsError: the URL is not a valid endpoint URL, or other users can read the key file.
    """
    if judge.url is None or judge.model is None:
        return None
    key = read_secret(judge.key_file, "ask its issuer to replace it") if judge.key_file else None
    endpoint = Endpoint(judge.url, judge.model, key)
    endpoint.check()
    return endpoint


def compare_answers(
    judge: Judge, heldout: Sequence[ChatExample], base: Sequence[ExampleResult], merged: Sequence[ExampleResult]
) -> JudgeReport:
    """Let the judge compare the merged model's answers with the base's, and return its report.

    Args:
        judge: the recipe's judge, which must have a URL and a model.
        heldout: all held-out examples, starting with the examples that the models answered.

    Raises:
        SvcError: the judge cannot be reached, or its replies are not valid verdicts.
    """
    endpoint = judge_endpoint(judge)
    assert endpoint is not None  # noqa: S101 - callers make sure that the recipe names a judge
    before, after = ([result.answer for result in results] for results in (base, merged))
    asked = heldout[: len(before)]
    return asyncio.run(judge_answers(endpoint, asked, before, after, title="judging merged against base"))
