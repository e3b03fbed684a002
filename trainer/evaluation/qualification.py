"""Qualifies a format: evaluates it on the engine that will serve it, and measures its probes there. Probes are short
token sequences whose log-probabilities show which weights are loaded.

The weights are loaded twice, once in place in a running engine and once by a new engine. Both engines must give the
same log-probabilities, which verifies that a hot swap serves the evaluated weights.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.client import EngineClient
from svc.engine.engine import Engine
from svc.engine.probes import (
    MAX_PROBES,
    EngineFacts,
    Probe,
    check_probes,
    choose_sequences,
    make_probes,
    measure_probes,
)
from svc.engine.state import EnginePhase
from svc.evaluation.evaluator import Evaluation, EvaluationReport, ask_examples, evaluate
from svc.evaluation.general.general_set import MAX_TOKENS
from svc.evaluation.intervals import Interval, mean
from svc.evaluation.preference import PairScores, TokenizedPair, score_pairs
from svc.evaluation.quiet_machine import measure_quietly
from svc.evaluation.results import ExampleResult
from svc.evaluation.throughput import STREAMS, decoding_speed, first_token_seconds
from svc.registry.parity import Speed
from svc.terminal import advancing, console, counting, waiting
from trainer.evaluation.answer_limit import answer_limits
from trainer.evaluation.token_scores import Scores, score_on_engine
from trainer.recipe.evaluate import Evaluate, Qualify

Launch = Callable[[Path], Engine]

_LOADS = 3


class EngineReading(BaseModel):
    """Measurements of a format on the engine. The parity report compares them with the trainer's measurements.

    Attributes:
        prompts_differ: indices of the evaluated examples whose prompt tokens differ between the engine and
            training.
        scores: token scores of the answers that the parity report compares.
    """

    model_config = ConfigDict(frozen=True)

    prompts_differ: tuple[int, ...]
    scores: Scores
    speed: Speed


class Qualified(BaseModel):
    """Results of verifying one format of a version on the engine.

    Attributes:
        results: the format's answer to each evaluated example.
        general: the answers to general questions, or an empty tuple if none were asked.
        reading: measurements for the parity report.
        pairs: log-probabilities of the held-out pairs, or None if there are none.
    """

    model_config = ConfigDict(frozen=True)

    evaluation: EvaluationReport
    results: tuple[ExampleResult, ...]
    general: tuple[ExampleResult, ...] = ()
    probes: tuple[Probe, ...]
    reading: EngineReading
    pairs: PairScores | None = None


@dataclass(frozen=True, slots=True)
class GeneralQuestions:
    """Questions unrelated to the task. They are put to the base and to every format that is a complete model.

    Attributes:
        tokenized: the same questions, tokenized as in training.
        of_base: the base's stored answers, or None if the base has not yet answered the questions.
    """

    examples: Sequence[ChatExample]
    tokenized: Sequence[TokenizedExample]
    of_base: tuple[ExampleResult, ...] | None = None


@dataclass(frozen=True, slots=True)
class BaseAnswers:
    """The base's evaluation together with its answers.

    Attributes:
        general: the answers to the general questions, or an empty tuple if none were asked.
        pairs: log-probabilities of the held-out pairs, or None if there are none.
    """

    evaluation: Evaluation
    general: tuple[ExampleResult, ...] = ()
    pairs: PairScores | None = None


class Qualifier:
    """Qualifies a run's formats on the engine that will serve them.

    Args:
        launch: creates a new, unstarted engine for a model folder.
        facts: returns the kind of engine that `launch` creates for a model folder.
        evaluate: the recipe's `evaluate` section, which sets the number of examples and the maximum answer
            length.
        qualify: the recipe's `qualify` section, which says how to measure the probes (svc.engine.probes).
        heldout: examples for the evaluation.
        tokenized: the same examples, tokenized as in training.
        compared: the examples whose answers the parity report compares token by token.
        context: the engine's maximum combined length of a prompt and its answer, in tokens.
        general: questions unrelated to the task, or None if none are asked.
        pairs: held-out pairs whose answers every model scores.

    Attributes:
        examples: the examples used in the evaluation.
        limits: maximum number of tokens in each answer.
    """

    def __init__(
        self,
        launch: Launch,
        facts: Callable[[Path], EngineFacts],
        evaluate: Evaluate,
        qualify: Qualify,
        heldout: Sequence[ChatExample],
        tokenized: Sequence[TokenizedExample],
        compared: Sequence[TokenizedExample],
        general: GeneralQuestions | None = None,
        *,
        context: int,
        pairs: Sequence[TokenizedPair] = (),
    ) -> None:
        self._launch = launch
        self._facts = facts
        self._options = qualify
        self.examples = heldout[: evaluate.limit]
        self._tokenized = tokenized[: evaluate.limit]
        self.limits = answer_limits(self._tokenized, context=context, fixed=evaluate.max_tokens)
        self._compared = compared
        self._general = general
        self._pairs = pairs

    async def base_and_merged(
        self, base: Path, merged: Path, *, same_fingerprint: bool, known: Evaluation | None = None
    ) -> tuple[BaseAnswers, Qualified]:
        """Evaluate the base, then the merged model. Both run in a single engine if the merged model can be loaded
        in place.

        Args:
            known: the base's evaluation from stored answers, or None to evaluate the base now.
        """
        async with self._engine(base) as engine:
            client, general = engine.client, self._general.of_base if self._general else None
            base_answers = BaseAnswers(
                known or await self._evaluate(client, "base", trained=False),
                general or await self._ask_general(client, "base"),
                await self._score_pairs(client, "base"),
            )
            if same_fingerprint and engine.capabilities.reloads:
                return base_answers, await self._qualify(engine, merged, "merged")
        return base_answers, await self.alone(merged, "merged")

    async def alone(self, folder: Path, text: str) -> Qualified:
        """Qualify a format on a new engine that serves only this format."""
        async with self._engine(folder) as engine:
            return await self._qualify(engine, folder, text)

    async def ask_base(self, base: Path) -> tuple[ExampleResult, ...]:
        """Ask the base the general questions on a separate engine, and return its answers."""
        async with self._engine(base) as engine:
            return await self._ask_general(engine.client, "base")

    async def _qualify(self, engine: Engine, folder: Path, text: str) -> Qualified:
        """Load a format, in place if possible, and measure it. If `qualify.restart` is set, the given engine is then
        stopped, and the probes are checked again on a new engine.
        """
        client, options = engine.client, self._options
        loads, others_share = await measure_quietly(partial(self._loads, engine, folder), engine.processor_s)
        evaluated = await self._evaluate(client, text)
        answered, pairs = await self._ask_general(client, text), await self._score_pairs(client, text)
        picked = self._tokenized[:: max(1, len(self.examples) // MAX_PROBES)]
        with waiting(f"measuring probe log-probabilities of {text}"):
            sequences = choose_sequences([(example.prompt, example.answer) for example in picked], MAX_PROBES)
            measured = await measure_probes(client, sequences, repeats=options.repeats)
            probes = make_probes(sequences, measured, self._facts(folder))
        with waiting(f"measuring speed and parity of {text}"):
            prompts = [example.prompt for example in picked]
            reading = await self._read(engine, prompts, mean(loads) if loads else None, others_share)
        if options.restart:
            await engine.stop()
            await self._check_on_fresh_engine(folder, probes, text)
        return Qualified(
            evaluation=evaluated.report,
            results=evaluated.results,
            general=answered,
            probes=probes,
            reading=reading,
            pairs=pairs,
        )

    async def _loads(self, engine: Engine, folder: Path) -> list[float]:
        """Reload the weights in the running engine several times, and return how long each reload took, in seconds. The
        result is empty if the engine cannot reload weights.
        """
        return [await self._load(engine.client, folder) for _ in range(_LOADS if engine.capabilities.reloads else 0)]

    async def _load(self, client: EngineClient, folder: Path) -> float:
        """Reload the weights in the running engine, and return how long this took, in seconds."""
        started = time.monotonic()
        await client.reload_weights(folder)
        seconds = time.monotonic() - started
        await client.reset_prefix_cache()
        return seconds

    async def _read(
        self, engine: Engine, prompts: Sequence[Sequence[int]], load_seconds: Interval | None, loading_share: float
    ) -> EngineReading:
        """Measure the loaded format's speed, and score the answers that the parity report compares.

        Args:
            loading_share: share of CPU time that other processes used while the weights were being loaded.
        """
        client = engine.client
        asked = [await client.prompt_tokens(example.prompt, example.tools) for example in self.examples]
        pairs = enumerate(zip(asked, self._tokenized, strict=True))

        async def answers() -> tuple[Interval, dict[int, Interval]]:
            first = await first_token_seconds(client, max(prompts, key=len))
            return first, {streams: await decoding_speed(client, prompts, streams) for streams in (1, STREAMS)}

        (first, decoded), others_share = await measure_quietly(answers, engine.processor_s)
        speed = Speed(
            load_seconds=load_seconds,
            first_token_seconds=first,
            tokens_per_second=decoded,
            memory_bytes=engine.memory(),
            others_share=max(others_share, loading_share),
        )
        return EngineReading(
            prompts_differ=tuple(index for index, (prompt, row) in pairs if row.prompt != tuple(prompt)),
            scores=await score_on_engine(client, self._compared),
            speed=speed,
        )

    async def _check_on_fresh_engine(self, folder: Path, probes: Sequence[Probe], text: str) -> None:
        async with self._engine(folder) as engine:
            difference = await check_probes(engine.client, probes)
        console.print(
            f"  {text}: log-probabilities after an in-place reload and on a new engine differ by {difference:.4f}"
        )

    async def _evaluate(self, client: EngineClient, text: str, *, trained: bool = True) -> Evaluation:
        with counting(f"evaluating {text}", len(self.examples)) as advance:
            return await evaluate(
                client, self.examples, self._tokenized, limits=self.limits, trained=trained, on_done=advance
            )

    async def _ask_general(self, client: EngineClient, text: str) -> tuple[ExampleResult, ...]:
        """Ask a model the general questions and return its answers. No model in the run was trained on these
        questions.
        """
        if self._general is None:
            return ()
        examples, tokenized = self._general.examples, self._general.tokenized
        with counting(f"sending general questions to {text}", len(examples)) as advance:
            limits = [MAX_TOKENS] * len(examples)
            return await ask_examples(client, examples, tokenized, limits=limits, trained=False, on_done=advance)

    async def _score_pairs(self, client: EngineClient, text: str) -> PairScores | None:
        """Return a model's scores of the held-out pairs, or None if there are no pairs."""
        if not self._pairs:
            return None
        with counting(f"scoring held-out pairs with {text}", len(self._pairs)) as advance:
            return await score_pairs(client, self._pairs, on_done=advance)

    @asynccontextmanager
    async def _engine(self, folder: Path) -> AsyncIterator[Engine]:
        """Start a new engine with the given model, yield it, and stop it after the `with` block."""
        engine = self._launch(folder)
        with advancing("engine", tuple(EnginePhase)) as on_phase:
            await engine.start(on_phase)
        try:
            yield engine
        finally:
            await engine.stop()
