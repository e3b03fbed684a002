"""Evaluates a run's models (base, merged, quantized) on the engine, using the held-out examples.

Stored answers are scored again with the metrics that the recipe currently names.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.objective import Objective
from svc.dataset.schema.preference import PreferencePair
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import DeviceCapabilities
from svc.engine.probes import engine_facts
from svc.errors import EngineError
from svc.evaluation.evaluator import Evaluation, EvaluationReport, score_answers
from svc.evaluation.forgetting import Forgetting
from svc.evaluation.general.general_set import MAX_TOKENS, GeneralSet
from svc.evaluation.metrics.choose import choose_metrics, try_on_references
from svc.evaluation.metrics.metric import Metric
from svc.evaluation.preference import PairScores, PreferenceReport, TokenizedPair
from svc.evaluation.results import ExampleResult
from svc.model_folder.chat_template import TemplateKwargs, choose_template_kwargs
from svc.registry.fingerprint import compatibility_fingerprint
from svc.settings.settings import Settings
from svc.terminal import console
from svc.version import QUANTIZED_FORMATS, SERVED_FORMATS, Format
from trainer.base_model.resolve import Base
from trainer.data.chat_template import tokenize_as_trained
from trainer.data.length import check_served_length, truncate
from trainer.evaluation.cache import EvaluationCache, evaluation_cache
from trainer.evaluation.call_parser import check_call_parser
from trainer.evaluation.evaluation_engine import evaluation_engine, served_context
from trainer.evaluation.forgetting_check import ForgettingTest
from trainer.evaluation.qualification import BaseAnswers, GeneralQuestions, Launch, Qualified, Qualifier
from trainer.evaluation.token_scores import choose_examples
from trainer.pipeline.run_folder import Run
from trainer.recipe.evaluate import Evaluate
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import QUALIFY_STAGES, Stage


class Evaluated(BaseModel):
    """Result of the `evaluate` stage.

    Attributes:
        base_results: the base's answer to each evaluated example.
        base_general: the base's answers to the general questions, or an empty tuple if none were asked.
        base_pairs: the base's log-probabilities of the held-out pairs, or None if there are none.
    """

    model_config = ConfigDict(frozen=True)

    base: EvaluationReport
    base_results: tuple[ExampleResult, ...]
    base_general: tuple[ExampleResult, ...]
    merged: Qualified
    base_pairs: PairScores | None = None


class QualifiedQuantized(Qualified):
    """Result of a stage that qualifies a quantized format.

    Attributes:
        base_general: the base's answers to the general questions, or an empty tuple if none were asked.
    """

    base_general: tuple[ExampleResult, ...] = ()


@dataclass(frozen=True)
class RunEvaluation:
    """Evaluates the models of one run.

    Args:
        heldout: all held-out examples; the first `options.limit` of them are evaluated.
        questions: the general questions, or None if there are none.
        launch: creates engines; defaults to vLLM processes on this machine.
        pairs: held-out pairs; the first `options.limit` of them are scored.
    """

    settings: Settings
    capabilities: DeviceCapabilities
    base: Base
    run: Run
    recipe: Recipe
    heldout: Sequence[ChatExample]
    questions: GeneralSet | None
    pairs: Sequence[PreferencePair] = ()
    launch: Launch | None = None

    @property
    def options(self) -> Evaluate:
        """The `evaluate` section of the recipe."""
        return self.recipe.evaluate

    @cached_property
    def template_kwargs(self) -> TemplateKwargs:
        """Arguments of the chat template, the same for the base and its versions."""
        return choose_template_kwargs(self.base.folder, self.recipe.chat_template_kwargs)

    @cached_property
    def tokenized(self) -> list[TokenizedExample]:
        """The held-out examples, tokenized as in training. Documents are truncated as in training."""
        rows = tokenize_as_trained(self.base.folder, self.heldout, self.template_kwargs)
        if self.recipe.objective is not Objective.TEXT:
            return rows
        return [truncate(row, min(self.recipe.train.max_length, self.context - 1)) for row in rows]

    @cached_property
    def tokenized_pairs(self) -> list[TokenizedPair]:
        """The held-out pairs to score, tokenized as in training."""
        pairs, folder, kwargs = self.pairs[: self.options.limit], self.base.folder, self.template_kwargs
        if not pairs:
            return []
        chosen = tokenize_as_trained(folder, [pair.chosen for pair in pairs], kwargs)
        return list(zip(chosen, tokenize_as_trained(folder, [pair.rejected for pair in pairs], kwargs), strict=True))

    @property
    def compared(self) -> list[TokenizedExample]:
        """The examples whose answers the parity report compares token by token."""
        return choose_examples(self.tokenized[: self.options.limit])

    @property
    def context(self) -> int:
        """Maximum total number of tokens in a prompt and its answer on this machine's engine."""
        return served_context(self.base.folder, self.settings.engine)

    @cached_property
    def metrics(self) -> Sequence[Metric]:
        """The evaluation metrics, chosen based on all held-out examples. Later evaluations of the version choose
        them in the same way.

        Raises:
            RecipeError: the recipe names a metric that does not exist or cannot score these examples.
        """
        return choose_metrics(self.heldout, self.options.metric_options)

    @cached_property
    def forgetting(self) -> ForgettingTest | None:
        """The test that measures how much the model forgot, or None if there are no general questions or only an
        adapter is registered.
        """
        if self.questions is None or set(self.recipe.formats).isdisjoint(SERVED_FORMATS):
            return None
        tokenized = tokenize_as_trained(self.base.folder, self.questions.examples, self.template_kwargs)
        return ForgettingTest(self.questions, tokenized, self._cache)

    @property
    def evaluated(self) -> Evaluated | None:
        """Result of the `evaluate` stage, or None if the recipe does not list the merged format."""
        return self.run.load(Stage.EVALUATE, Evaluated) if Format.MERGED in self.recipe.formats else None

    @property
    def quantized(self) -> dict[Format, QualifiedQuantized]:
        """Results of the recipe's quantized formats, keyed by format."""
        formats = [format for format in QUANTIZED_FORMATS if format in self.recipe.formats]
        return {format: self.run.load(QUALIFY_STAGES[format], QualifiedQuantized) for format in formats}

    @property
    def qualified(self) -> dict[Format, Qualified]:
        """Results of the formats that are complete models (merged and quantized), keyed by format."""
        qualified: dict[Format, Qualified] = {}
        if evaluated := self.evaluated:
            qualified[Format.MERGED] = evaluated.merged
        return qualified | self.quantized

    @property
    def forgotten(self) -> dict[Format, Forgetting]:
        """Forgetting of each evaluated format, relative to the base. Empty if no general questions were asked."""
        if self.forgetting is None:
            return {}
        forgotten: dict[Format, Forgetting] = {}
        if evaluated := self.evaluated:
            forgotten[Format.MERGED] = self.forgetting.compare(evaluated.base_general, evaluated.merged.general)
        for format, quantized in self.quantized.items():
            forgotten[format] = self.forgetting.compare(quantized.base_general, quantized.general)
        return forgotten

    @property
    def base_preference(self) -> PreferenceReport | None:
        """The base's preference accuracy on the held-out pairs, or None if it has not scored any."""
        evaluated = self.evaluated
        return PreferenceReport.of(evaluated.base_pairs) if evaluated and evaluated.base_pairs else None

    @property
    def preferences(self) -> dict[Format, PreferenceReport]:
        """Each format's preference accuracy on the held-out pairs; empty if there are no pairs."""
        evaluated = self.evaluated
        base = evaluated.base_pairs if evaluated else None
        scores = {format: qualified.pairs for format, qualified in self.qualified.items()}
        return {format: PreferenceReport.of(pairs, base) for format, pairs in scores.items() if pairs}

    def check(self) -> None:
        """Check before training that no example exceeds the engine's maximum length, and that all examples can be
        scored.

        Raises:
            SvcError: an example exceeds the engine's maximum length, the engine is not set up to extract tool calls
                from answers, or a metric cannot score the reference answers.
        """
        check_call_parser(self.heldout, self.settings.engine.args)
        check_served_length(self.tokenized, self.context, "held-out", room=self.options.max_tokens or 0)
        check_served_length([rejected for _, rejected in self.tokenized_pairs], self.context, "rejected held-out")
        if self.forgetting:
            check_served_length(self.forgetting.tokenized, self.context, "general", room=MAX_TOKENS)
        try_on_references(self.metrics, self.heldout[: self.options.limit])

    def evaluate(self) -> Evaluated:
        """Evaluate the base and the merged model. If the base's answers to the same examples are stored, they are
        reused.
        """
        base, merged, test = self.base, self.run.merged, self.forgetting
        general = test.prepare(base.revision, base.folder) if test else None
        qualifier, cache = self._qualifier(general), self._cache(base.revision, base.folder)
        known, known_general = cache.find(qualifier.examples, qualifier.limits), general.of_base if general else ()
        evaluation = score_answers(qualifier.examples, known, seconds=0.0) if known else None
        if evaluation:
            console.print("  base: already evaluated on these examples")
        if evaluation and known_general is not None and not self.pairs:
            answers = BaseAnswers(evaluation, known_general)
            qualified = asyncio.run(qualifier.alone(merged, "merged"))
        else:
            prints = {compatibility_fingerprint(folder, self.template_kwargs) for folder in (base.folder, merged)}
            same = len(prints) == 1
            work = qualifier.base_and_merged(base.folder, merged, same_fingerprint=same, known=evaluation)
            answers, qualified = asyncio.run(work)
            self._keep(base.revision, base.folder, answers.evaluation.results, answers.general)
        report, results = answers.evaluation.report, answers.evaluation.results
        return Evaluated(
            base=report,
            base_results=results,
            base_general=answers.general,
            merged=qualified,
            base_pairs=answers.pairs,
        )

    def qualify_quantized(self, format: Format) -> QualifiedQuantized:
        """Evaluate a quantized model. The base answers the general questions first, unless its answers are already
        stored.

        Raises:
            EngineError: the base cannot be served, for example because only the quantized model fits into
                memory.
        """
        base, test = self.base, self.forgetting
        general = test.prepare(base.revision, base.folder) if test else None
        qualifier, of_base = self._qualifier(general), general.of_base if general else ()
        if test and of_base is None:
            try:
                of_base = asyncio.run(qualifier.ask_base(base.folder))
            except EngineError as error:
                wrong = f"cannot send the general questions to the base: {error.wrong}"
                todo = "; or ".join(filter(None, (error.todo, "set evaluate.general to false")))
                raise EngineError(wrong, expected=error.expected, todo=todo) from error
            test.keep(base.revision, base.folder, of_base)
        qualified = asyncio.run(qualifier.alone(self.run.weights(format), format))
        return QualifiedQuantized.model_validate({**dict(qualified), "base_general": of_base})

    def keep_merged(self, revision: str, folder: Path, merged: Qualified) -> None:
        """Store the answers of a registered merged model, for versions that use it as their base."""
        self._keep(revision, folder, merged.results, merged.general)

    def judge_format(self, measured: Qualified) -> Qualified:
        """Score one format's stored answers again with the current metrics, and return the updated evaluation."""
        results = measured.results
        evaluation = score_answers(self.heldout[: len(results)], results, measured.evaluation.seconds, self.metrics)
        return measured.model_copy(update={"evaluation": evaluation.report, "results": evaluation.results})

    def judge_base(self, evaluated: Evaluated) -> Evaluation:
        """Score the base's stored answers again with the current metrics, and return its report and results."""
        results = evaluated.base_results
        return score_answers(self.heldout[: len(results)], results, evaluated.base.seconds, self.metrics)

    def _keep(
        self, revision: str, model: Path, results: Sequence[ExampleResult], general: Sequence[ExampleResult]
    ) -> None:
        self._cache(revision, model).add(self.heldout[: self.options.limit], results)
        if self.forgetting:
            self.forgetting.keep(revision, model, general)

    def _cache(self, revision: str, model: Path) -> EvaluationCache:
        """Return the cache of a model's evaluation results under the current settings."""
        kwargs = self.template_kwargs
        return evaluation_cache(self.settings, self.capabilities, revision, model, template_kwargs=kwargs)

    def _qualifier(self, general: GeneralQuestions | None) -> Qualifier:
        launch = self.launch or partial(
            evaluation_engine,
            settings=self.settings,
            capabilities=self.capabilities,
            run=self.run.folder,
            name=self.recipe.name,
            template_kwargs=self.template_kwargs,
        )
        facts = partial(engine_facts, self.settings.engine, self.capabilities)
        parts = (self.options, self.recipe.qualify, self.heldout, self.tokenized, self.compared, general)
        return Qualifier(launch, facts, *parts, context=self.context, pairs=self.tokenized_pairs)
