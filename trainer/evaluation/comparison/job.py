"""Runs a comparison, from the command's arguments to its result. Stored answers are reused, and the remaining models
are run on engines, one model at a time. Before the comparison starts, prints which data will leave this machine.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import httpx
import numpy as np

from svc.dataset.prompt_hashes import TRAINED_PROMPTS_FILE, hash_prompts, read_prompt_hashes
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import DeviceCapabilities, read_capabilities
from svc.engine.probes import engine_facts
from svc.errors import DataError, NotFoundError
from svc.evaluation.comparison import VersionComparison, compare
from svc.evaluation.endpoint import Endpoint, ask_endpoint
from svc.evaluation.evaluator import ask_examples
from svc.evaluation.judge import JudgeReport, judge_answers
from svc.evaluation.metrics.choose import MetricOptions, choose_metrics, try_on_references
from svc.evaluation.metrics.metric import Metric
from svc.evaluation.results import ExampleResult
from svc.files.lock import hold_lock
from svc.model_folder.chat_template import TemplateKwargs
from svc.registry.fingerprint import tokenizer_fingerprint
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.terminal import console, counting
from svc.version import Format, VersionId
from trainer.data.chat_template import tokenize_as_trained
from trainer.data.length import check_served_length
from trainer.evaluation.answer_limit import answer_limits, limit_of_text
from trainer.evaluation.cache import EvaluationCache, evaluation_cache, find_results, results_by_example
from trainer.evaluation.call_parser import check_call_parser
from trainer.evaluation.comparison.model import LocalModel, Model, asked_alike, find_model
from trainer.evaluation.evaluation_engine import LaunchModel, ReusedEngine, evaluation_engine, served_context
from trainer.recipe.evaluate import Evaluate

FOLDER = "compare"
"""Folder in $SVC_HOME for the engine's log and a lock file."""

Tokenize = Callable[[Path, Sequence[ChatExample], TemplateKwargs], list[TokenizedExample]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The arguments of `svc compare`, named like its options.

    Attributes:
        key: API key for models that are endpoints.
        judge: endpoint of a judge that also compares the answers, or None for no judge.
    """

    first: str
    second: str
    data: Sequence[str] = ()
    limit: int | None = None
    format: str | None = None
    max_tokens: int | None = None
    metrics: Sequence[str] = ()
    primary: str | None = None
    fresh: bool = False
    key: str | None = field(default=None, repr=False)
    judge: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Questions:
    """The questions of a comparison.

    Attributes:
        origin: source of the examples, for display.
        max_tokens: token limit for every answer; if None, the limit depends on each reference answer.
        metrics: metrics for the answers, chosen based on all examples of the source even if only some are sent.
    """

    examples: Sequence[ChatExample]
    origin: str
    max_tokens: int | None
    metrics: Sequence[Metric]


@dataclass(frozen=True, slots=True)
class Answers:
    """One model's answers to the examples.

    Attributes:
        kept: whether all answers were already stored, in which case the model was not run.
    """

    results: tuple[ExampleResult, ...]
    kept: bool


@dataclass(frozen=True, slots=True)
class Compared:
    """A completed comparison: the two models, the questions, their answers and the result."""

    models: Sequence[Model]
    questions: Questions
    answers: Sequence[Answers]
    comparison: VersionComparison
    judge: JudgeReport | None = None


_Asked = tuple[Sequence[TokenizedExample], Sequence[int]]
"""The examples, tokenized for one model, and the token limit for each answer."""


@dataclass(frozen=True)
class ComparisonJob:
    """Compares model B with model A.

    Args:
        capabilities: capabilities of this machine, or None to read them.
        launch: creates a new, unstarted engine; defaults to a vLLM process on this machine.
        tokenize: function that tokenizes examples as in training.
        transport: HTTP transport for requests to endpoints, or None to use the network.
    """

    settings: Settings
    wanted: Wanted
    registry: Registry
    capabilities: DeviceCapabilities | None = None
    launch: LaunchModel | None = None
    tokenize: Tokenize = tokenize_as_trained
    transport: httpx.AsyncBaseTransport | None = None

    def run(self) -> Compared:
        """Compare the models.

        Raises:
            BusyError: another comparison is running in this home folder.
            SvcError: a model, the data or a metric is missing or unusable, or an engine failed.
        """
        models, questions, judge = self.models, self.questions, None
        try_on_references(questions.metrics, questions.examples)
        self._warn()
        with hold_lock(self.settings.home / FOLDER / "lock", "svc compare in this home folder"):
            answers = asyncio.run(self._ask())
        first, second = (of_model.results for of_model in answers)
        comparison = compare(questions.examples, first, second, questions.metrics, no_tokens=_why_no_tokens(models))
        if endpoint := self.wanted.judge:
            texts = ([result.answer for result in results] for results in (first, second))
            judge = asyncio.run(judge_answers(endpoint, questions.examples, *texts, title="judging B against A"))
        return Compared(models, questions, answers, comparison, judge)

    @cached_property
    def models(self) -> list[Model]:
        """The two models, A first."""
        format = Format(self.wanted.format) if self.wanted.format else None
        find = partial(find_model, registry=self.registry, settings=self.settings, format=format, key=self.wanted.key)
        first, second = find(self.wanted.first), find(self.wanted.second)
        return [asked_alike(*pair, self.settings.base_cache) for pair in ((first, second), (second, first))]

    @cached_property
    def questions(self) -> Questions:
        """The examples of the comparison, with the metrics and token limits for the answers.

        If the command names no data, the held-out set that the versions share is used, limited to the examples on which
        the versions were evaluated. If the command also names no metrics, the first version's metrics are used.

        Raises:
            DataError: neither model has a held-out set, the versions have different held-out sets, or the data cannot
                be read.
        """
        wanted = self.wanted
        versions = [model.manifest for model in self.models if isinstance(model, LocalModel) and model.manifest]
        options = MetricOptions(tuple(wanted.metrics) or None, wanted.primary)
        longest = wanted.max_tokens or (versions[0].max_answer_tokens if versions else None)
        if wanted.data:
            whole = read_examples(wanted.data, cache=self.settings.base_cache)
            return Questions(whole[: wanted.limit], ", ".join(wanted.data), longest, choose_metrics(whole, options))
        if not versions:
            raise DataError("neither model has a held-out set", todo="provide examples with --data FILE")
        if len({version.data.heldout_fingerprint for version in versions}) > 1:
            raise DataError(
                f"{versions[0].id} and {versions[1].id} have different held-out sets",
                expected="versions that were evaluated on the same examples",
                todo="provide the examples with --data FILE",
            )
        counts = [count for count in (wanted.limit, *(version.judged_examples for version in versions)) if count]
        whole = self.registry.heldout(versions[0].id)
        if options == MetricOptions():
            options = Evaluate.model_validate(versions[0].recipe.get("evaluate", {})).metric_options
        origin = f"the held-out set of {versions[0].id}"
        return Questions(whole[: min(counts, default=None)], origin, longest, choose_metrics(whole, options))

    def _warn(self) -> None:
        """Warn, for each model, if prompts will be sent to its endpoint, or if it was trained on some of the
        prompts.
        """
        count = len(self.questions.examples)
        for model in self.models:
            message = ""
            if isinstance(model, Endpoint):
                message = f"the prompts of {count} examples will be sent to {model.url}"
            elif model.manifest and (learnt := self._count_learnt(model.manifest)):
                message = f"{model} was trained on {learnt} of {count} prompts, so its results are too optimistic"
            if message:
                console.print(message, style="yellow", markup=False, soft_wrap=True)

    def _count_learnt(self, version: Manifest) -> int:
        """Return the number of examples whose prompts a version, or any version in its chain of bases, was trained
        on.
        """
        prompts = hash_prompts(self.questions.examples)
        learnt = np.zeros(len(prompts), bool)
        while True:
            learnt |= np.isin(prompts, read_prompt_hashes(self.registry.reference(version.id, TRAINED_PROMPTS_FILE)))
            try:
                version = self.registry.manifest(VersionId.parse(version.base.origin))
            except NotFoundError:  # the base is not a version, or was removed
                return int(learnt.sum())

    async def _ask(self) -> list[Answers]:
        """Return each model's answers, in the order of the models. New answers are stored.

        Raises:
            SvcError: an engine or an endpoint failed, or an example is too long; all engines are stopped.
        """
        local = {model.revision: model for model in self.models if isinstance(model, LocalModel)}
        prepared = {revision: self._prepare(model) for revision, model in local.items()}
        known = {revision: self._known(model, prepared[revision][1]) for revision, model in local.items()}
        kept = {revision: results for revision, results in known.items() if results}
        asked = await self._on_engines(
            {revision: local[revision] for revision in local if revision not in kept}, prepared
        )
        answers = []
        for model in self.models:
            if isinstance(model, Endpoint):
                answers.append(Answers(await self._at_endpoint(model, list(prepared.values())), kept=False))
            else:
                answers.append(Answers((kept | asked)[model.revision], kept=model.revision in kept))
        return answers

    async def _at_endpoint(self, endpoint: Endpoint, local: Sequence[_Asked]) -> tuple[ExampleResult, ...]:
        """Return the answers of a remote endpoint.

        The answers get the token limits of the local model with which the endpoint is compared, so that both models'
        answers have the same maximum length. If both models are endpoints, whose tokenizers are unknown, the limits are
        upper bounds derived from the size of each reference answer in bytes. A limit that is too high costs some
        tokens, whereas a limit that is too low would cut off correct answers.
        """
        examples, fixed = self.questions.examples, self.questions.max_tokens
        limits = local[0][1] if local else [fixed or limit_of_text(example.answer) for example in examples]
        with counting(f"asking {endpoint}", len(examples)) as advance:
            return await ask_endpoint(endpoint, examples, limits=limits, on_done=advance, transport=self.transport)

    async def _on_engines(
        self, models: dict[str, LocalModel], prepared: dict[str, _Asked]
    ) -> dict[str, tuple[ExampleResult, ...]]:
        """Run the models one after the other, store their answers, and return them keyed by model revision.

        A model with the same fingerprint as the previous one is loaded into the same engine. Any other model
        gets a new engine.
        """
        settings, examples = self.settings, self.questions.examples
        if models:
            check_call_parser(examples, settings.engine.args)
        launch = self.launch or partial(
            evaluation_engine,
            settings=settings,
            capabilities=self._able,
            run=settings.home / FOLDER,
            name="compared",
        )
        results = {}
        async with ReusedEngine(launch) as engine:
            for revision, model in models.items():
                client, trained = await engine.serve(model.folder, model.template_kwargs), model.manifest is not None
                tokenized, limits = prepared[revision]
                with counting(f"asking {model}", len(examples)) as advance:
                    results[revision] = await ask_examples(
                        client, examples, tokenized, limits=limits, trained=trained, on_done=advance
                    )
                self._cache(model).add(examples, results[revision])
        return results

    def _prepare(self, model: LocalModel) -> _Asked:
        """Tokenize and check the examples before any engine starts, so that errors show up immediately."""
        fixed = self.questions.max_tokens
        tokenized = self.tokenize(model.folder, self.questions.examples, model.template_kwargs)
        served = served_context(model.folder, self.settings.engine)
        check_served_length(tokenized, served, model.name, room=fixed or 0)
        return tokenized, answer_limits(tokenized, context=served, fixed=fixed)

    def _known(self, model: LocalModel, limits: Sequence[int]) -> tuple[ExampleResult, ...] | None:
        """Return the answers that are stored for these token limits and this kind of engine, or None if the answer to
        any example is missing.
        """
        if self.wanted.fresh:
            return None
        return self._cache(model).find(self.questions.examples, limits) or self._registered(model, limits)

    def _registered(self, model: LocalModel, limits: Sequence[int]) -> tuple[ExampleResult, ...] | None:
        """Return the answers stored when the version was registered, or None if any are missing or not comparable."""
        manifest, format = model.manifest, model.format
        if manifest is None or format is None:
            return None
        facts = engine_facts(self.settings.engine, self._able, model.folder)
        if {probe.engine.key for probe in manifest.formats[format].probes} != {facts.key}:
            return None
        try:
            results = self.registry.results(manifest.id, format)
        except NotFoundError:
            return None
        registered = zip(self.registry.heldout(manifest.id), results, strict=False)
        return find_results(results_by_example(registered), self.questions.examples, limits)

    def _cache(self, model: LocalModel) -> EvaluationCache:
        return evaluation_cache(
            self.settings, self._able, model.revision, model.folder, template_kwargs=model.template_kwargs
        )

    @cached_property
    def _able(self) -> DeviceCapabilities:
        return self.capabilities or read_capabilities(self.settings.home)


def _why_no_tokens(models: Sequence[Model]) -> str:
    """Return the reason why token metrics cannot be compared, or an empty string if they can."""
    folders = {model.folder for model in models if isinstance(model, LocalModel)}
    if any(isinstance(model, Endpoint) for model in models):
        return "a remote endpoint returns no log-probabilities for a prompt, and uses its own tokenizer"
    different = len({tokenizer_fingerprint(folder) for folder in folders}) > 1
    return "the two models have different tokenizers" if different else ""
