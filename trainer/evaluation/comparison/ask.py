"""Collects models' answers to the same examples. Stored answers are reused, and the remaining models are
run on engines, one model at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.client import EngineClient
from svc.engine.device import DeviceCapabilities
from svc.engine.model_facts import read_model_facts
from svc.engine.probes import engine_facts
from svc.errors import NotFoundError
from svc.evaluation.endpoint import Endpoint, ask_endpoint
from svc.evaluation.evaluator import ask_examples
from svc.evaluation.results import ExampleResult
from svc.model_folder.chat_template import TemplateKwargs
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.terminal import counting
from trainer.data.chat_template import tokenize_as_trained
from trainer.data.length import check_served_length
from trainer.evaluation.answer_limit import answer_limits, limit_of_text
from trainer.evaluation.cache import EvaluationCache, find_results, results_by_example
from trainer.evaluation.call_parser import check_call_parser
from trainer.evaluation.comparison.model import LocalModel, Model
from trainer.evaluation.evaluation_cache import evaluation_cache
from trainer.evaluation.evaluation_engine import LaunchModel, ReusedEngine

Tokenize = Callable[[Path, Sequence[ChatExample], TemplateKwargs], list[TokenizedExample]]


@dataclass(frozen=True, slots=True)
class Answers:
    """One model's answers to the examples.

    Attributes:
        kept: whether all answers were already stored, in which case the model was not run.
    """

    results: tuple[ExampleResult, ...]
    kept: bool


_Asked = tuple[Sequence[TokenizedExample], Sequence[int]]
"""The examples, tokenized for one model, and the token limit for each answer."""


@dataclass(frozen=True)
class Interview:
    """Collects several models' answers to the same examples.

    Args:
        max_tokens: token limit for every answer; if None, the limit depends on each reference answer.
        launch: creates a new, unstarted engine for a model folder.
        fresh: whether to ignore stored answers.
        tokenize: function that tokenizes examples as in training.
        transport: HTTP transport for requests to endpoints, or None to use the network.
    """

    settings: Settings
    capabilities: DeviceCapabilities
    registry: Registry
    launch: LaunchModel
    examples: Sequence[ChatExample]
    max_tokens: int | None
    fresh: bool = False
    tokenize: Tokenize = tokenize_as_trained
    transport: httpx.AsyncBaseTransport | None = None

    async def ask(self, models: Sequence[Model]) -> list[Answers]:
        """Return each model's answers, in the order of the models. New answers are stored.

        Raises:
            SvcError: an engine or an endpoint failed, or an example is too long; all engines are stopped.
        """
        local = {model.revision: model for model in models if isinstance(model, LocalModel)}
        prepared = {revision: self._prepare(model) for revision, model in local.items()}
        kept = {revision: self._known(model, prepared[revision][1]) for revision, model in local.items()}
        wanted = {revision: model for revision, model in local.items() if not kept[revision]}
        asked = await self._on_engines(wanted, prepared)
        answers = []
        for model in models:
            if isinstance(model, Endpoint):
                answers.append(Answers(await self._at_endpoint(model, list(prepared.values())), kept=False))
            else:
                known = kept[model.revision]
                answers.append(Answers(known or asked[model.revision], kept=known is not None))
        return answers

    async def _at_endpoint(self, endpoint: Endpoint, local: Sequence[_Asked]) -> tuple[ExampleResult, ...]:
        """Return the answers of a remote endpoint.

        The answers get the token limits of the local model with which the endpoint is compared, so that both models'
        answers have the same maximum length. If both models are endpoints, whose tokenizers are unknown, the limits are
        upper bounds derived from the size of each reference answer in bytes. A limit that is too high costs some
        tokens, whereas a limit that is too low would cut off correct answers.
        """
        if local:
            (_, limits), *_ = local
        else:
            limits = [self.max_tokens or limit_of_text(example.answer) for example in self.examples]
        with counting(f"asking {endpoint}", len(self.examples)) as advance:
            return await ask_endpoint(endpoint, self.examples, limits=limits, on_done=advance, transport=self.transport)

    async def _on_engines(
        self, models: dict[str, LocalModel], prepared: dict[str, _Asked]
    ) -> dict[str, tuple[ExampleResult, ...]]:
        """Run the models one after the other, store their answers, and return them keyed by model revision.

        A model with the same fingerprint as the previous one is loaded into the same engine. Any other model
        gets a new engine.
        """
        results = {}
        if models:
            check_call_parser(self.examples, self.settings.engine.args)
        async with ReusedEngine(self.launch) as engine:
            for revision, model in models.items():
                client = await engine.serve(model.folder, model.template_kwargs)
                results[revision] = await self._on_engine(client, model, prepared[revision])
                self._cache(model).add(self.examples, results[revision])
        return results

    async def _on_engine(self, client: EngineClient, model: LocalModel, asked: _Asked) -> tuple[ExampleResult, ...]:
        (tokenized, limits), trained = asked, model.manifest is not None
        with counting(f"asking {model}", len(self.examples)) as advance:
            return await ask_examples(client, self.examples, tokenized, limits=limits, trained=trained, on_done=advance)

    def _prepare(self, model: LocalModel) -> _Asked:
        """Tokenize and check the examples before any engine starts, so that errors show up immediately."""
        tokenized = self.tokenize(model.folder, self.examples, model.template_kwargs)
        longest = self.settings.engine.max_model_len
        served = min(longest, read_model_facts(model.folder).context or longest)
        check_served_length(tokenized, served, model.name, room=self.max_tokens or 0)
        return tokenized, answer_limits(tokenized, context=served, fixed=self.max_tokens)

    def _known(self, model: LocalModel, limits: Sequence[int]) -> tuple[ExampleResult, ...] | None:
        """Return the answers that are stored for these token limits and this kind of engine, or None if the answer to
        any example is missing.
        """
        if self.fresh:
            return None
        return self._cache(model).find(self.examples, limits) or self._registered(model, limits)

    def _registered(self, model: LocalModel, limits: Sequence[int]) -> tuple[ExampleResult, ...] | None:
        """Return the answers stored when the version was registered, or None if any are missing or not comparable."""
        manifest, format = model.manifest, model.format
        if manifest is None or format is None:
            return None
        facts = engine_facts(self.settings.engine, self.capabilities, model.folder)
        if {probe.engine.key for probe in manifest.formats[format].probes} != {facts.key}:
            return None
        try:
            results = self.registry.results(manifest.id, format)
        except NotFoundError:
            return None
        registered = zip(self.registry.heldout(manifest.id), results, strict=False)
        return find_results(results_by_example(registered), self.examples, limits)

    def _cache(self, model: LocalModel) -> EvaluationCache:
        kwargs = model.template_kwargs
        return evaluation_cache(self.settings, self.capabilities, model.revision, model.folder, template_kwargs=kwargs)
