"""The models of a run on the engine: base, merged and GPTQ are asked the held-out examples, and their answers judged.

Answers are judged by the metrics that the recipe names now, whenever they were given.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import DeviceCapabilities
from svc.engine.model_facts import read_model_facts
from svc.engine.probes import engine_facts
from svc.evaluation.cache import EvaluationCache
from svc.evaluation.evaluator import Evaluation, EvaluationReport, judge
from svc.evaluation.general.general_set import MAX_TOKENS, GeneralSet
from svc.evaluation.metrics.choose import choose_metrics, try_on_references
from svc.evaluation.metrics.metric import Metric
from svc.evaluation.results import ExampleResult
from svc.evaluation.token_scores import choose_examples
from svc.model_folder.chat_template import TemplateKwargs
from svc.registry.fingerprint import compatibility_fingerprint
from svc.settings import Settings
from svc.terminal import console
from svc.version import Format
from trainer.base_model.resolve import Base
from trainer.data.chat_template import tokenize_as_trained
from trainer.data.length import check_served_length
from trainer.pipeline.evaluation_cache import evaluation_cache
from trainer.pipeline.evaluation_engine import evaluation_engine
from trainer.pipeline.forgetting import ForgettingTest
from trainer.pipeline.run_folder import Run
from trainer.qualification import BaseAnswers, GeneralQuestions, Launch, Qualified, Qualifier
from trainer.recipe.sections import Evaluate, Qualify
from trainer.recipe.stage import Stage


class Evaluated(BaseModel):
    """Result of the stage `evaluate`.

    Attributes:
        base_results: the answers behind the report.
        base_general: to the general questions; none where none were asked.
    """

    model_config = ConfigDict(frozen=True)

    base: EvaluationReport
    base_results: tuple[ExampleResult, ...]
    base_general: tuple[ExampleResult, ...]
    merged: Qualified


@dataclass(frozen=True)
class RunEvaluation:
    """Evaluates the models of one run.

    Args:
        capabilities: of this device.
        heldout: all examples; `options.limit` of them are asked.
        questions: general ones; None where none are asked.
        formats: that the recipe asks for.
        name: of the model in requests.
        template_kwargs: what the base's chat template is given: the base is asked as its versions are.
        launch: makes engines; default: vLLM processes on this machine.
    """

    settings: Settings
    capabilities: DeviceCapabilities
    base: Base
    run: Run
    heldout: Sequence[ChatExample]
    questions: GeneralSet | None
    formats: Sequence[Format]
    options: Evaluate
    qualify: Qualify
    name: str
    template_kwargs: TemplateKwargs
    launch: Launch | None = None

    @cached_property
    def tokenized(self) -> list[TokenizedExample]:
        """The held-out examples as they are trained on."""
        return tokenize_as_trained(self.base.folder, self.heldout, self.template_kwargs)

    @property
    def compared(self) -> list[TokenizedExample]:
        """Those that are compared token by token."""
        return choose_examples(self.tokenized[: self.options.limit])

    @property
    def context(self) -> int:
        """Tokens of a prompt with its answer that an engine here accepts."""
        longest = self.settings.engine.max_model_len
        return min(longest, read_model_facts(self.base.folder).context or longest)

    @cached_property
    def metrics(self) -> Sequence[Metric]:
        """Chosen by all held-out examples, as later where they are asked again.

        Raises:
            RecipeError: the recipe names a metric that does not exist, or that cannot judge them.
        """
        return choose_metrics(self.heldout, self.options.metric_options)

    @cached_property
    def forgetting(self) -> ForgettingTest | None:
        """None where no general questions are asked: by the recipe, or since the base is not judged either."""
        if self.questions is None or Format.MERGED not in self.formats:
            return None
        tokenized = tokenize_as_trained(self.base.folder, self.questions.examples, self.template_kwargs)
        return ForgettingTest(self.questions, tokenized, self._cache)

    @property
    def evaluated(self) -> Evaluated | None:
        """The result of the stage `evaluate`; None where base and merged model are not asked for."""
        return self.run.load(Stage.EVALUATE, Evaluated) if Format.MERGED in self.formats else None

    @property
    def qualified(self) -> dict[Format, Qualified]:
        """The formats that can be served."""
        found = {Format.MERGED: self.evaluated.merged} if self.evaluated else {}
        if Format.GPTQ in self.formats:
            found[Format.GPTQ] = self.run.load(Stage.QUALIFY, Qualified)
        return found

    def check(self) -> None:
        """Check before training that everything can be asked and judged.

        Raises:
            SvcError: an example does not fit into the engine, or a metric cannot judge.
        """
        check_served_length(self.tokenized, self.context, "held-out", room=self.options.max_tokens or 0)
        if self.forgetting:
            check_served_length(self.forgetting.tokenized, self.context, "general", room=MAX_TOKENS)
        try_on_references(self.metrics, self.heldout[: self.options.limit])

    def evaluate(self) -> Evaluated:
        """Evaluate base and merged model; a base that was asked the same before is not asked again."""
        base, merged, test = self.base, self.run.merged, self.forgetting
        general = test.prepare(base.revision, base.folder) if test else None
        qualifier, cache = self._qualifier(general), self._cache(base.revision, base.folder)
        known, known_general = cache.find(qualifier.judged, qualifier.limits), general.of_base if general else ()
        if known and known_general is not None:
            console.print("  base: judged before on these examples")
            answers = BaseAnswers(judge(qualifier.judged, known, seconds=0.0), known_general)
            qualified = asyncio.run(qualifier.alone(merged, "merged", general=True))
        else:
            prints = {compatibility_fingerprint(folder, self.template_kwargs) for folder in (base.folder, merged)}
            work = qualifier.base_and_merged(base.folder, merged, same_fingerprint=len(prints) == 1)
            answers, qualified = asyncio.run(work)
            self._keep(base.revision, base.folder, answers.evaluation.results, answers.general)
        report, results = answers.evaluation.report, answers.evaluation.results
        return Evaluated(base=report, base_results=results, base_general=answers.general, merged=qualified)

    def qualify_gptq(self) -> Qualified:
        """Evaluate the quantized model."""
        return asyncio.run(self._qualifier().alone(self.run.gptq, "gptq"))

    def keep_merged(self, revision: str, folder: Path, merged: Qualified) -> None:
        """Store the answers of a registered merged model, for a version that it is the base of."""
        self._keep(revision, folder, merged.results, merged.general)

    def judge_format(self, found: Qualified) -> Qualified:
        """Return a format judged again by the metrics; its answers are those that were measured."""
        judged = judge(self.heldout[: len(found.results)], found.results, found.evaluation.seconds, self.metrics)
        return found.model_copy(update={"evaluation": judged.report, "results": judged.results})

    def judge_base(self, found: Evaluated) -> Evaluation:
        """Return the base's report and results, judged again by the metrics."""
        results = found.base_results
        return judge(self.heldout[: len(results)], results, found.base.seconds, self.metrics)

    def _keep(
        self, revision: str, model: Path, results: Sequence[ExampleResult], general: Sequence[ExampleResult]
    ) -> None:
        self._cache(revision, model).add(self.heldout[: self.options.limit], results)
        if self.forgetting:
            self.forgetting.keep(revision, model, general)

    def _cache(self, revision: str, model: Path) -> EvaluationCache:
        """Return the answers that a model has given before, on an engine as it is started now."""
        kwargs = self.template_kwargs
        return evaluation_cache(self.settings, self.capabilities, revision, model, template_kwargs=kwargs)

    def _qualifier(self, general: GeneralQuestions | None = None) -> Qualifier:
        launch = self.launch or partial(
            evaluation_engine,
            settings=self.settings,
            capabilities=self.capabilities,
            run=self.run.folder,
            name=self.name,
            template_kwargs=self.template_kwargs,
        )
        facts = partial(engine_facts, self.settings.engine, self.capabilities)
        parts = (self.options, self.qualify, self.heldout, self.tokenized, self.compared, general)
        return Qualifier(launch, facts, *parts, context=self.context)
