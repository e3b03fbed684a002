"""Probes: short token sequences whose log-probabilities distinguish one set of weights from another.

Probes are recorded when a version is qualified, and checked after every load. They show *which* weights are loaded, not
whether those weights are any good. An engine of a different kind (vLLM version, device, instruction set, compiled or
not) rounds differently. For such an engine, new probes are recorded instead of loosening the tolerance.
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
from svc.settings.engine import Device, EngineSettings, GptqKernel

MAX_PROBES = 8
MAX_TOKENS = 64
MIN_TOLERANCE = 1e-3
"""Minimum tolerance, in nats. On the CPU, repeated measurements of a single probe agree to four decimal places if no
other requests are running, while the wrong model's weights give values that differ by about 10 nats."""
_REMEASUREMENTS = 5
"""Maximum number of times that a probe is measured again if it differs from its recorded values. With AMX, rounding
depends on the batch size, with differences of up to 0.28 nats. Probes measured alone never differed, but with up to 15
other requests streaming at the same time, one in forty measurements differed."""

TokenId = Annotated[int, Field(ge=0)]
Scored = tuple[Sequence[int], int]
"""A sequence of token ids, and the index of the first token to score."""


class EngineFacts(BaseModel):
    """Properties of an engine that affect its rounding and thereby define its kind.

    Attributes:
        dtype: data type that the engine computes in.
        kernel: kernel for 4-bit weights, or `vllm` if the model has no 4-bit weights.
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
        """String that identifies the kind of engine. Engines of the same kind have equal keys."""
        return self.model_dump_json()


class Probe(BaseModel):
    """A token sequence and the log-probabilities that a version assigns to it.

    Attributes:
        token_ids: the sequence, at most 64 tokens.
        start: index of the first token of the answer.
        logprobs: natural-log probability of each token from `start` onward.
        tolerance: largest allowed absolute difference of any log-probability, in nats.
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
    """Return the properties that affect how an engine with these settings rounds numbers on this machine.

    Args:
        model: folder of the model that the engine serves.

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
    """Select evenly spaced prompt-answer pairs, and cut each to a sequence of at most 64 tokens.

    Args:
        pairs: token ids of the prompts and of their answers.
        count: number of sequences, at most 8.

    Returns:
        Pairs of a sequence and the index at which its answer starts.
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
    """Score all sequences repeatedly, one at a time, so that the differences reveal the engine's noise.

    Args:
        repeats: number of measurements per sequence, at least 1.

    Returns:
        The log-probabilities of each sequence, for each measurement.
    """
    return [[await client.logprobs(*sequence) for sequence in sequences] for _ in range(repeats)]


def make_probes(
    sequences: Sequence[Scored], measured: Sequence[Sequence[tuple[float, ...]]], facts: EngineFacts
) -> tuple[Probe, ...]:
    """Create probes from repeated measurements.

    The tolerance is twice the largest difference from the first measurement, but at least 0.001.

    Args:
        measured: result of `measure_probes`. Measurements from several engines of the same kind can be
            concatenated.

    Raises:
        ProbeError: a measurement is not a finite number.
    """
    probes = []
    for index, (token_ids, start) in enumerate(sequences):
        reference = measured[0][index]
        noise = max(_difference(reference, run[index]) for run in measured)
        if math.isinf(noise):
            raise ProbeError(
                f"the engine returned a non-finite log-probability for probe {index + 1}",
                expected="finite log-probabilities",
                todo="train again with a lower learning rate, because the weights are unusable",
            )
        tolerance = max(MIN_TOLERANCE, 2 * noise)
        probe = Probe(token_ids=tuple(token_ids), start=start, logprobs=reference, tolerance=tolerance, engine=facts)
        probes.append(probe)
    return tuple(probes)


async def check_probes(client: EngineClient, probes: Sequence[Probe]) -> float:
    """Measure all probes on the engine and compare the results with the stored log-probabilities.

    All probes are first measured concurrently, which halves the time. Those that differ are measured again
    one at a time, up to five times. Rounding depends on which requests share a batch, whereas wrong weights
    differ in every batch.

    Returns:
        The largest difference, in nats.

    Raises:
        ProbeError: a probe differed by more than its tolerance in every measurement, or there are no probes.
    """
    if not probes:
        raise ProbeError(
            "the version has no reference log-probabilities (probes) for this format",
            todo="run the version's recipe again: svc train registers a version with probes for each of its formats",
        )
    differences = await asyncio.gather(*(_difference_on(client, probe) for probe in probes))
    for number, probe in enumerate(probes, start=1):
        difference, remaining = differences[number - 1], _REMEASUREMENTS
        while difference > probe.tolerance and remaining:
            difference, remaining = await _difference_on(client, probe), remaining - 1
        differences[number - 1] = difference
        if difference > probe.tolerance:
            raise ProbeError(
                f"probe {number} of {len(probes)} differs by {difference:.4f} nats from its recorded log-probabilities"
                ": the loaded weights are not the version's weights",
                expected=f"a difference of at most {probe.tolerance:.4f} nats",
                todo="do not serve these files; restore the version's folder from a backup, or train again",
            )
    return max(differences)


async def _difference_on(client: EngineClient, probe: Probe) -> float:
    return _difference(probe.logprobs, await client.logprobs(probe.token_ids, probe.start))


def _difference(expected: Sequence[float], measured: Sequence[float]) -> float:
    if not all(math.isfinite(value) for value in (*expected, *measured)):
        return math.inf
    return max(abs(one - other) for one, other in zip(expected, measured, strict=True))
