"""Asks models: what was answered before is taken as it is, for the others one engine runs after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from svc.chat_template import TemplateKwargs
from svc.dataset.fingerprint import fingerprint
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.capabilities import Capabilities
from svc.engine.engine import Engine
from svc.engine.model_facts import read_model_facts
from svc.engine.probes import engine_facts
from svc.engine.vllm.startup_phase import EnginePhase
from svc.errors import NotFoundError
from svc.evaluation.cache import EvaluationCache
from svc.evaluation.endpoint import Endpoint, ask_endpoint
from svc.evaluation.evaluator import ask_examples
from svc.evaluation.results import ExampleResult
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.registry import Registry
from svc.settings import Settings
from svc.terminal import advancing, counting
from trainer.comparison.model import LocalModel, Model
from trainer.data.chat_template import tokenize_as_trained
from trainer.data.length import check_served_length
from trainer.pipeline.evaluation_cache import evaluation_cache

LaunchModel = Callable[[Path, TemplateKwargs], Engine]
Tokenize = Callable[[Path, Sequence[ChatExample], TemplateKwargs], list[TokenizedExample]]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model answered.

    Attributes:
        kept: nothing was asked.
    """

    results: tuple[ExampleResult, ...]
    kept: bool


@dataclass(frozen=True)
class Interview:
    """The same examples for each model.

    Args:
        launch: makes a new, unstarted engine for a model folder.
        fresh: ask also what was answered before.
        tokenize: examples as training sees them.
        transport: to endpoints, in place of the network.
    """

    settings: Settings
    capabilities: Capabilities
    registry: Registry
    launch: LaunchModel
    examples: Sequence[ChatExample]
    max_tokens: int
    fresh: bool = False
    tokenize: Tokenize = tokenize_as_trained
    transport: httpx.AsyncBaseTransport | None = None

    async def ask(self, models: Sequence[Model]) -> list[Answers]:
        """The answers of each, in the order of the models.

        Raises:
            SvcError: an engine or an endpoint failed, or an example is too long; no engine is left running.
        """
        kept = [self._known(model) for model in models]
        wanted = [
            model for model, known in zip(models, kept, strict=True) if isinstance(model, LocalModel) and not known
        ]
        asked = await self._on_engines({model.revision: model for model in wanted})
        answers = []
        for model, known in zip(models, kept, strict=True):
            if isinstance(model, Endpoint):
                answers.append(Answers(await self._at_endpoint(model), kept=False))
            else:
                answers.append(Answers(known or asked[model.revision], kept=known is not None))
        return answers

    async def _at_endpoint(self, endpoint: Endpoint) -> tuple[ExampleResult, ...]:
        with counting(f"asking {endpoint}", len(self.examples)) as advance:
            return await ask_endpoint(
                endpoint, self.examples, max_tokens=self.max_tokens, on_done=advance, transport=self.transport
            )

    async def _on_engines(self, models: dict[str, LocalModel]) -> dict[str, tuple[ExampleResult, ...]]:
        """By revision. A model that fits in place of the one before takes over its engine."""
        tokenized = {revision: self._tokenize(model) for revision, model in models.items()}
        engine, holds, found = None, "", {}
        try:
            for revision, model in models.items():
                fits = compatibility_fingerprint(model.folder, model.template_kwargs)
                if engine is not None and engine.capabilities.reloads and holds == fits:
                    await engine.client.reload_weights(model.folder)
                    await engine.client.reset_prefix_cache()
                else:
                    if engine is not None:
                        await engine.stop()
                    engine, holds = self.launch(model.folder, model.template_kwargs), fits
                    with advancing("engine", tuple(EnginePhase)) as on_phase:
                        await engine.start(on_phase)
                found[revision] = await self._on_engine(engine, model, tokenized[revision])
                self._cache(model).add(self.examples, found[revision])
        finally:
            if engine is not None:
                await engine.stop()
        return found

    async def _on_engine(
        self, engine: Engine, model: LocalModel, tokenized: Sequence[TokenizedExample]
    ) -> tuple[ExampleResult, ...]:
        with counting(f"asking {model.name}", len(self.examples)) as advance:
            return await ask_examples(
                engine.client,
                self.examples,
                tokenized,
                max_tokens=self.max_tokens,
                trained=model.manifest is not None,
                on_done=advance,
            )

    def _tokenize(self, model: LocalModel) -> list[TokenizedExample]:
        """Before any engine starts, so that what cannot be asked is told at once."""
        tokenized = self.tokenize(model.folder, self.examples, model.template_kwargs)
        longest = self.settings.engine.max_model_len
        served = min(longest, read_model_facts(model.folder).context or longest)
        check_served_length(tokenized, served, model.name, room=self.max_tokens)
        return tokenized

    def _known(self, model: Model) -> tuple[ExampleResult, ...] | None:
        """What a model has answered to all of the examples, asked alike on such an engine."""
        if self.fresh or isinstance(model, Endpoint):
            return None
        return self._cache(model).find(self.examples) or self._registered(model)

    def _registered(self, model: LocalModel) -> tuple[ExampleResult, ...] | None:
        """What a version answered when it was registered."""
        manifest, format = model.manifest, model.format
        if manifest is None or format is None or manifest.max_answer_tokens != self.max_tokens:
            return None
        facts = engine_facts(self.settings.engine, self.capabilities, model.folder)
        if {probe.engine.key for probe in manifest.formats[format].probes} != {facts.key}:
            return None
        try:
            results = self.registry.results(manifest.id, format)
        except NotFoundError:
            return None
        by_example = {
            fingerprint([example]): result
            for example, result in zip(self.registry.heldout(manifest.id), results, strict=False)
        }
        found = [by_example.get(fingerprint([example])) for example in self.examples]
        return tuple(result for result in found if result is not None) if all(found) else None

    def _cache(self, model: LocalModel) -> EvaluationCache:
        return evaluation_cache(
            self.settings,
            self.capabilities,
            model.revision,
            model.folder,
            max_tokens=self.max_tokens,
            template_kwargs=model.template_kwargs,
        )
