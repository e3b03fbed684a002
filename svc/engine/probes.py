"""Probes: short token sequences whose log-probabilities distinguish one set of weights from another.

Measured when a version is qualified, checked after every load. They show *which* weights are loaded, not that they are
good. An engine of another kind (version of vLLM, device, instruction set, compiled or not) rounds differently: there,
probes are measured again, and the tolerance is never loosened.
"""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from svc.engine.client import EngineClient
from svc.engine.device import DeviceCapabilities
from svc.engine.model_facts import read_model_facts
from svc.engine.vllm.number_type import choose_dtype, choose_gptq_kernel
from svc.engine.vllm.plan import is_eager
from svc.errors import ProbeError
from svc.settings import Device, EngineSettings, GptqKernel

MAX_PROBES = 8
MAX_TOKENS = 64
MIN_TOLERANCE = 1e-3
"""Nats. Repeated probes on the CPU differ by 0.0000; another model's weights by about 10."""

TokenId = Annotated[int, Field(ge=0)]
Scored = tuple[Sequence[int], int]
"""Token ids, and the index from which they are scored."""


class EngineFacts(BaseModel):
    """Properties of one engine that determine how it rounds.

    Attributes:
        dtype: number type in which it computes.
        kernel: kernel for 4-bit weights; vLLM's if the model has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vllm: str
    device: Device
    instruction_set: str
    mode: Literal["eager", "compiled"]
    dtype: str
    kernel: GptqKernel

    @property
    def key(self) -> str:
        """Text that is the same for equal facts."""
        return self.model_dump_json()


class Probe(BaseModel):
    """One sequence and the version's log-probabilities for it.

    Attributes:
        token_ids: at most 64.
        start: index of the first token of the answer.
        logprobs: natural-log probability of each token from `start` on.
        tolerance: maximum absolute difference of any log-probability, nats.
        engine: kind of engine on which the log-probabilities were measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: tuple[TokenId, ...] = Field(min_length=2, max_length=MAX_TOKENS)
    start: int = Field(ge=1)
    logprobs: tuple[float, ...] = Field(min_length=1)
    tolerance: float = Field(ge=MIN_TOLERANCE, allow_inf_nan=False)
    engine: EngineFacts

    @model_validator(mode="after")
    def _one_logprob_for_each_token(self) -> "Probe":
        if len(self.logprobs) != len(self.token_ids) - self.start:
            raise ValueError(f"{len(self.logprobs)} logprobs for {len(self.token_ids) - self.start} tokens")
        return self


def engine_facts(settings: EngineSettings, capabilities: DeviceCapabilities, model: Path) -> EngineFacts:
    """Return the facts about an engine that is started with these settings on this device.

    Args:
        model: its folder.

    Raises:
        EngineError: the model's format cannot be served here.
    """
    device, facts = capabilities.device(settings), read_model_facts(model)
    return EngineFacts(
        vllm=capabilities.vllm,
        device=device,
        instruction_set=capabilities.hardware(settings),
        mode="eager" if is_eager(settings, device) else "compiled",
        dtype=str(choose_dtype(settings, capabilities, facts).value),
        kernel=choose_gptq_kernel(settings, capabilities, facts) or GptqKernel.VLLM,
    )


def choose_sequences(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], count: int) -> list[Scored]:
    """Return evenly picked prompts with their answers, cut to at most 64 tokens.

    Args:
        pairs: token ids of prompts and of their answers.
        count: number of sequences, at most 8.

    Returns:
        Pairs of a sequence and the index where its answer starts.
    """
    step = max(1, len(pairs) // count)
    chosen: list[Scored] = []
    for prompt, answer in pairs[::step][:count]:
        cut_answer = tuple(answer)[: MAX_TOKENS // 2]
        cut_prompt = tuple(prompt)[-(MAX_TOKENS - len(cut_answer)) :]
        chosen.append((cut_prompt + cut_answer, len(cut_prompt)))
    return chosen


async def measure_probes(
    client: EngineClient, sequences: Sequence[Scored], *, repeats: int
) -> list[list[tuple[float, ...]]]:
    """Measure all sequences repeatedly, in batches and alone; the differences are the engine's noise.

    After each batch one sequence is measured alone, in turn, which shows the same noise in a fifth of the time.

    Args:
        repeats: batches, at least 1; 20 for a version's manifest.

    Returns:
        Log-probabilities by measurement and sequence.
    """
    measured = []
    for repeat in range(repeats):
        batch = await _measure(client, sequences)
        measured.append(batch)
        index = repeat % len(sequences)
        alone = list(batch)
        alone[index] = await client.logprobs(*sequences[index])
        measured.append(alone)
    return measured


def make_probes(
    sequences: Sequence[Scored], measured: Sequence[Sequence[tuple[float, ...]]], facts: EngineFacts
) -> tuple[Probe, ...]:
    """Return probes whose tolerance is twice the largest difference of any measurement to the first, at least 0.001.

    Args:
        measured: from `measure_probes`; measurements on several engines of one kind may be concatenated.

    Raises:
        ProbeError: a measurement is not a finite number.
    """
    probes = []
    for index, (token_ids, start) in enumerate(sequences):
        reference = measured[0][index]
        noise = max(_difference(reference, run[index]) for run in measured)
        if math.isinf(noise):
            raise ProbeError(
                f"a log-probability that the engine returned for probe {index + 1} is not finite",
                expected="finite log-probabilities",
                todo="train again with a lower learning rate: the weights are not usable",
            )
        tolerance = max(MIN_TOLERANCE, 2 * noise)
        probe = Probe(token_ids=tuple(token_ids), start=start, logprobs=reference, tolerance=tolerance, engine=facts)
        probes.append(probe)
    return tuple(probes)


async def check_probes(client: EngineClient, probes: Sequence[Probe]) -> float:
    """Measure all probes concurrently on the engine and compare.

    Returns:
        The largest difference, nats.

    Raises:
        ProbeError: a difference exceeds its probe's tolerance, or there is no probe.
    """
    if not probes:
        raise ProbeError("the version has no probes for this format", todo="qualify the version again")
    measured = await _measure(client, [(probe.token_ids, probe.start) for probe in probes])
    differences = [_difference(probe.logprobs, values) for probe, values in zip(probes, measured, strict=True)]
    for number, (probe, difference) in enumerate(zip(probes, differences, strict=True), start=1):
        if not difference <= probe.tolerance:  # also true for NaN
            raise ProbeError(
                f"probe {number} of {len(probes)} differs by {difference:.4f} nats: not the version's weights",
                expected=f"at most {probe.tolerance:.4f}",
                todo="do not serve these files; train again or restore the version's folder from a backup",
            )
    return max(differences)


async def _measure(client: EngineClient, sequences: Sequence[Scored]) -> list[tuple[float, ...]]:
    return await asyncio.gather(*(client.logprobs(token_ids, start) for token_ids, start in sequences))


def _difference(expected: Sequence[float], measured: Sequence[float]) -> float:
    if any(not math.isfinite(value) for value in measured):
        return math.inf
    return max(abs(one - other) for one, other in zip(expected, measured, strict=True))
