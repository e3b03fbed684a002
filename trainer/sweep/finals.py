"""Finals of a sweep: the trials with the lowest held-out loss are evaluated on the engine, and their answers decide
which trial wins.

Held-out loss says little about general ability, and does not fully predict the primary metric. Measuring either of them
requires generated answers, so only a few trials are measured, on a single engine. Each adapter is merged, and the
merged weights are loaded in place, as they are when `svc train` evaluates a version. This works for every adapter
type, including those that vLLM does not serve.
"""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.client import EngineClient
from svc.engine.device import DeviceCapabilities
from svc.evaluation.comparison import Direction, compare
from svc.evaluation.evaluator import ask_examples, score_answers
from svc.evaluation.forgetting import Forgetting, measure_forgetting, tracked
from svc.evaluation.general.general_set import MAX_TOKENS
from svc.evaluation.intervals import Interval
from svc.evaluation.metrics.choose import choose_metrics, try_on_references
from svc.evaluation.metrics.metric import Better, Metric
from svc.evaluation.results import ExampleResult
from svc.evaluation.verdict import GateOutcome
from svc.model_folder.chat_template import write_template_kwargs
from svc.settings.settings import Settings
from svc.terminal import console, counting
from svc.version import Format
from trainer.data.chat_template import tokenize_as_trained
from trainer.data.length import check_served_length
from trainer.evaluation.answer_limit import answer_limits
from trainer.evaluation.cache import evaluation_cache
from trainer.evaluation.call_parser import check_call_parser
from trainer.evaluation.evaluation_engine import LaunchModel, ReusedEngine, evaluation_engine, served_context
from trainer.evaluation.forgetting_check import judge_forgetting
from trainer.export.merge import merge_adapter
from trainer.recipe.evaluate import Undecided
from trainer.sweep.outcome import TrialComparison, TrialOutcome
from trainer.sweep.trial_runner import TrialRunner
from trainer.sweep.values import describe


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial in the finals, together with its answers on the engine.

    Attributes:
        results: answers to the held-out examples.
        primary: the trial's primary metric.
        forgetting: measured forgetting, or None if no general questions were asked.
        allowed: whether the loss of general ability is within `evaluate.max_forgetting`.
    """

    trial: TrialOutcome
    results: tuple[ExampleResult, ...]
    primary: Interval
    forgetting: Forgetting | None
    allowed: bool


class FinalLine(BaseModel):
    """One row in the table of finalists.

    Attributes:
        values: recipe keys that the trial changes, with their values.
        primary: the trial's primary metric.
        difference: primary metric minus the winner's, on the same examples.
        general: share of correct answers to the general questions, or None if none were asked.
        forgetting: the `general` share minus the base's share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: dict[str, Any]
    primary: Interval
    difference: Interval
    general: Interval | None
    forgetting: Interval | None
    allowed: bool


class FinalsResult(BaseModel):
    """Result of a sweep's finals.

    Attributes:
        metric: name of the primary metric.
        examples: number of held-out examples that were answered.
        general: the base's share of correct answers to the general questions, or None if none were asked.
        questions: number of general questions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    examples: int
    general: Interval | None
    questions: int
    lines: tuple[FinalLine, ...]


@dataclass(frozen=True)
class Finals:
    """Measures a sweep's best trials on the engine and chooses the winner.

    Args:
        launch: creates engines; defaults to vLLM processes on this machine.
    """

    runner: TrialRunner
    settings: Settings
    capabilities: DeviceCapabilities
    launch: LaunchModel | None = None

    @cached_property
    def examples(self) -> tuple[ChatExample, ...]:
        """The held-out examples that finalists have to answer."""
        return self.runner.heldout[: self.runner.recipe.evaluate.limit]

    @cached_property
    def metric(self) -> Metric:
        """The primary metric, chosen as in `svc train`.

        Raises:
            RecipeError: the recipe names a metric that does not exist or cannot score these examples.
        """
        return choose_metrics(self.runner.examples.heldout, self.runner.recipe.evaluate.metric_options)[0]

    @cached_property
    def _context(self) -> int:
        return served_context(self.runner.base.folder, self.settings.engine)

    def check(self) -> None:
        """Check before the first trial that the engine can answer the examples and that the metric can score them.

        Raises:
            SvcError: an example exceeds the engine's maximum length, or the metric cannot score the reference answers.
        """
        room = self.runner.recipe.evaluate.max_tokens or 0
        check_call_parser(self.examples, self.settings.engine.args)
        check_served_length(self._tokenized, self._context, "held-out", room=room)
        check_served_length(self._tokenized_questions, self._context, "general", room=MAX_TOKENS)
        try_on_references([self.metric], self.examples)

    def rank(self, trials: Sequence[TrialOutcome]) -> list[TrialOutcome]:
        """Return the completed trials that have an adapter, without duplicates. The first two trials
        (the unchanged recipe and the preferred trial) stay first; the others are sorted by held-out loss.
        """
        order = [*trials[:2], *sorted(trials[2:], key=lambda trial: trial.mean)]
        unique: dict[str, TrialOutcome] = {}
        for trial in order:
            if trial.loss and self.runner.adapter(trial).is_dir():
                unique.setdefault(trial.key, trial)
        return list(unique.values())

    def measure(self, trials: Sequence[TrialOutcome]) -> list[Finalist]:
        """Evaluate the first trial and `sweep.finalists` more. While all evaluated trials forget too much, continue
        with the next one.

        Args:
            trials: trials with adapters, in order of preference.

        Raises:
            SvcError: the engine failed.
        """
        self.runner.unload()
        return asyncio.run(self._measure(trials))

    def choose(self, finalists: Sequence[Finalist], preferred: TrialOutcome, losses: TrialComparison) -> Finalist:
        """Choose the winner among the finalists.

        Finalists that forget too much are excluded; if all of them do, the one that forgets least wins. Of the
        remaining finalists, those whose primary metric is significantly worse than the best value are excluded
        too. Held-out loss decides among the rest.

        Args:
            preferred: the trial that would win by held-out loss.
        """
        allowed = [finalist for finalist in finalists if finalist.allowed]
        if not allowed:
            return max(finalists, key=lambda finalist: finalist.forgetting.after.value if finalist.forgetting else 0.0)
        sign = -1 if self.metric.better is Better.LOWER else 1
        best = max(allowed, key=lambda finalist: sign * finalist.primary.value)
        good = {finalist.trial.key: finalist for finalist in allowed if not self._is_worse(finalist, best)}
        if preferred.key in good:
            return good[preferred.key]
        return good[losses.choose([finalist.trial for finalist in good.values()]).key]

    def reasons(self, winner: Finalist, finalists: Sequence[Finalist], preferred: TrialOutcome) -> list[str]:
        """Return sentences that explain why held-out loss alone would have chosen a different winner. The list is
        empty if it would have chosen the same one.
        """
        if not winner.allowed:
            return [
                "all measured trials forget more than evaluate.max_forgetting allows, so the trial that forgets least "
                "wins"
            ]
        loser = next(finalist for finalist in finalists if finalist.trial.key == preferred.key)
        if loser is winner:
            return []
        why = (
            f"its {self.metric.title} is worse"
            if loser.allowed
            else "it forgets more than evaluate.max_forgetting allows"
        )
        return [f"{describe(preferred.values)} would win by held-out loss, but {why}"]

    def result(self, winner: Finalist, finalists: Sequence[Finalist]) -> FinalsResult:
        """Return the result of the finals, which includes the table of finalists."""
        lines = [
            FinalLine(
                values=finalist.trial.values,
                primary=finalist.primary,
                difference=self._compare(winner, finalist)[0],
                general=finalist.forgetting.after if finalist.forgetting else None,
                forgetting=finalist.forgetting.difference if finalist.forgetting else None,
                allowed=finalist.allowed,
            )
            for finalist in finalists
        ]
        return FinalsResult(
            metric=self.metric.name,
            examples=len(self.examples),
            general=winner.forgetting.before if winner.forgetting else None,
            questions=winner.forgetting.examples if winner.forgetting else 0,
            lines=tuple(lines),
        )

    def _is_worse(self, finalist: Finalist, best: Finalist) -> bool:
        return finalist is not best and self._compare(best, finalist)[1] is Direction.WORSE

    def _compare(self, first: Finalist, second: Finalist) -> tuple[Interval, Direction]:
        compared = compare(self.examples, first.results, second.results, [self.metric]).metrics[self.metric.name]
        return compared.difference, compared.direction

    async def _measure(self, trials: Sequence[TrialOutcome]) -> list[Finalist]:
        base, questions = self.runner.base, self.runner.examples.questions
        launch = self.launch or partial(
            evaluation_engine,
            settings=self.settings,
            capabilities=self.capabilities,
            run=self.runner.folder,
            name=self.runner.recipe.name,
        )
        finalists: list[Finalist] = []
        async with ReusedEngine(launch) as engine:
            [before] = await self._ask(engine, "base", base.revision, lambda: base.folder, task=False)
            for trial in trials:
                if len(finalists) > self.runner.recipe.sweep.finalists and any(one.allowed for one in finalists):
                    break
                name, revision = describe(trial.values), f"{self.runner.folder.name}/{trial.key}"
                if self.runner.recipe.merge_dequantized:
                    revision += "/dequantized"
                try:
                    results, after = await self._ask(engine, name, revision, partial(self._merge, trial), task=True)
                finally:
                    shutil.rmtree(self._merged(trial), ignore_errors=True)
                forgetting = measure_forgetting(questions, before, after) if questions else None
                finalists.append(self._finalist(trial, results, forgetting))
        return finalists

    def _finalist(
        self, trial: TrialOutcome, results: tuple[ExampleResult, ...], forgetting: Forgetting | None
    ) -> Finalist:
        """Score a trial's answers and return the finalist. Print its metrics and add them to the trial's MLflow run."""
        evaluation = score_answers(self.examples, results, 0.0, [self.metric])
        primary, options = evaluation.report.figures[self.metric.name].estimate, self.runner.recipe.evaluate
        allowed = True
        if forgetting and options.max_forgetting is not None:
            outcome = judge_forgetting(forgetting, options.max_forgetting, Format.MERGED).verdict.outcome
            undecided = outcome is GateOutcome.UNDECIDED and options.undecided is Undecided.WARN
            allowed = outcome is GateOutcome.PASSED or undecided
        general = f", general questions {forgetting.after}" if forgetting else ""
        console.print(f"  {describe(trial.values)}: {self.metric.title} {primary}{general}", soft_wrap=True)
        figures = {f"final_{self.metric.name}": primary.value} | (
            tracked(forgetting, Format.MERGED) if forgetting else {}
        )
        self.runner.log_final(trial, figures)
        return Finalist(trial, evaluation.results, primary, forgetting, allowed)

    async def _ask(
        self, engine: ReusedEngine, name: str, revision: str, make: Callable[[], Path], *, task: bool
    ) -> list[tuple[ExampleResult, ...]]:
        """Return a model's answers to the general questions. Stored answers are reused.

        Args:
            make: function that returns the model's folder. It is called only if answers are missing.
            task: whether to return the model's answers to the held-out examples as well, as the first item.
        """
        runner, kwargs = self.runner, self.runner.template_kwargs
        cache = evaluation_cache(self.settings, self.capabilities, revision, runner.base.folder, template_kwargs=kwargs)
        general = ("general questions", self._questions, self._tokenized_questions, MAX_TOKENS)
        examples = ("examples", self.examples, self._tokenized, runner.recipe.evaluate.max_tokens)
        client: EngineClient | None = None
        answers = []
        for what, asked, tokenized, fixed in (examples, general) if task else (general,):
            limits = answer_limits(tokenized, context=self._context, fixed=fixed)
            known = cache.find(asked, limits)
            if known is None:
                client = client or await engine.serve(make(), kwargs)
                with counting(f"{what} to {name}", len(asked)) as advance:
                    known = await ask_examples(
                        client, asked, tokenized, limits=limits, trained=what == examples[0], on_done=advance
                    )
                cache.add(asked, known)
            answers.append(known)
        return answers

    @property
    def _questions(self) -> tuple[ChatExample, ...]:
        questions = self.runner.examples.questions
        return questions.examples if questions else ()

    @cached_property
    def _tokenized(self) -> list[TokenizedExample]:
        return self._tokenize(self.examples)

    @cached_property
    def _tokenized_questions(self) -> list[TokenizedExample]:
        return self._tokenize(self._questions)

    def _tokenize(self, examples: Sequence[ChatExample]) -> list[TokenizedExample]:
        return tokenize_as_trained(self.runner.base.folder, examples, self.runner.template_kwargs) if examples else []

    def _merged(self, trial: TrialOutcome) -> Path:
        return self.runner.folder / "finals" / trial.key

    def _merge(self, trial: TrialOutcome) -> Path:
        """Write a trial's merged model and return its folder."""
        merged = self._merged(trial)
        shutil.rmtree(merged, ignore_errors=True)
        dequantized = self.runner.recipe.merge_dequantized
        merge_adapter(self.runner.base.folder, self.runner.adapter(trial), merged, dequantized=dequantized)
        write_template_kwargs(merged, self.runner.template_kwargs)
        return merged
