"""How good the answers are: by the metrics that the recipe names now, whenever they were given, and by its judge."""

import asyncio
from collections.abc import Sequence
from functools import cached_property

from svc.dataset.schema.example import ChatExample
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.evaluator import EvaluationReport, judge
from svc.evaluation.judge import JudgeReport, Pair, judge_pairs
from svc.evaluation.metrics.choose import MetricSet, choose_metrics, try_on_references
from svc.evaluation.results import ExampleResult
from svc.key_file import read_secret
from svc.terminal import counting
from trainer.qualification import Qualified
from trainer.recipe.sections import Evaluate, Judge


class Judging:
    """Judges answers to the first examples of one held-out set.

    Args:
        heldout: all examples.
        options: the recipe's.
    """

    def __init__(self, heldout: Sequence[ChatExample], options: Evaluate) -> None:
        self._heldout = heldout
        self._options = options

    @cached_property
    def metrics(self) -> MetricSet:
        """Chosen by all held-out examples, as later where they are asked again.

        Raises:
            RecipeError: the recipe names what is none, or cannot judge them.
        """
        return choose_metrics(self._heldout, self._options.metric_options)

    def check(self) -> None:
        """Whether the metrics can judge at all, before there is an answer.

        Raises:
            SvcError: one cannot.
        """
        try_on_references(self.metrics, self._heldout[: self._options.limit])

    def judge_format(self, found: Qualified) -> Qualified:
        """A format, whose answers are what was measured."""
        judged = judge(self._heldout[: len(found.results)], found.results, found.evaluation.seconds, self.metrics)
        return found.model_copy(update={"evaluation": judged.report, "results": judged.results})

    def judge_report(self, report: EvaluationReport, results: Sequence[ExampleResult]) -> EvaluationReport:
        """Return the report computed again from its answers."""
        return judge(self._heldout[: len(results)], results, report.seconds, self.metrics).report


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
    answers = zip(heldout, base, merged, strict=False)
    pairs = [Pair(example, before.answer, after.answer) for example, before, after in answers]
    with counting("judging merged beside base", len(pairs)) as advance:
        return asyncio.run(judge_pairs(pairs, endpoint, on_done=advance))
