"""Tests that probes accept only the weights they were recorded from, within the engine's noise."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from svc.engine.device import DeviceCapabilities
from svc.engine.probes import (
    MAX_PROBES,
    MAX_TOKENS,
    MIN_TOLERANCE,
    EngineFacts,
    Probe,
    check_probes,
    choose_sequences,
    engine_facts,
    make_probes,
    measure_probes,
)
from svc.errors import ProbeError
from svc.settings.engine import Device, EngineSettings, GptqKernel
from tests.serving.engine_double import EngineDouble
from tests.svc.engine.devices import AMX, AVX2, AVX512
from tests.svc.engine.in_process import client_of

FACTS = EngineFacts(
    vllm="0.32.0",
    device=Device.CPU,
    instruction_set="x86_64-avx512f",
    mode="eager",
    dtype="bfloat16",
    kernel=GptqKernel.VLLM,
)
SEQUENCES = [((5, 6, 7, 8), 2), ((9, 10, 11), 1)]


async def probes_of(double: EngineDouble) -> tuple[Probe, ...]:
    async with client_of(double) as client:
        return make_probes(SEQUENCES, await measure_probes(client, SEQUENCES, repeats=2), FACTS)


def add_noise(double: EngineDouble, nats: Sequence[float]) -> None:
    """Add noise to the log-probabilities of the next requests and none after them."""
    following = chain(nats, repeat(0.0))
    double.on_call = lambda path: setattr(double, "probe_noise", next(following))


async def check(double: EngineDouble, probes: Sequence[Probe]) -> float:
    async with client_of(double) as client:
        return await check_probes(client, probes)


async def test_verification_probe_of_identical_weights_passes_with_no_difference() -> None:
    assert await check(EngineDouble(), await probes_of(EngineDouble())) == 0.0


async def test_verification_probe_passes_and_reports_a_difference_within_the_tolerance() -> None:
    probes = await probes_of(EngineDouble())
    assert await check(EngineDouble(probe_noise=MIN_TOLERANCE / 2), probes) == pytest.approx(MIN_TOLERANCE / 2)


async def test_verification_probe_fails_if_the_difference_exceeds_the_tolerance() -> None:
    probes = await probes_of(EngineDouble())
    with pytest.raises(ProbeError, match=r"probe 1 of 2 differs by 0\.0020 nats") as caught:
        await check(EngineDouble(probe_noise=2 * MIN_TOLERANCE), probes)
    assert caught.value.expected == "a difference of at most 0.0010 nats"


async def test_verification_probe_fails_if_the_engine_has_different_weights() -> None:
    probes = await probes_of(EngineDouble())
    with pytest.raises(ProbeError, match="not the version's weights"):
        await check(EngineDouble(weights="/models/tuned/2"), probes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_non_finite_log_probability_fails_the_probe(value: float) -> None:
    probes = await probes_of(EngineDouble())
    with pytest.raises(ProbeError):
        await check(EngineDouble(probe_noise=value), probes)


async def test_verification_probe_that_recorded_nan_fails() -> None:
    damaged = [probe.model_copy(update={"logprobs": (math.nan, -1.0)}) for probe in await probes_of(EngineDouble())]
    with pytest.raises(ProbeError):
        await check(EngineDouble(), damaged)


async def test_verification_probe_passes_for_identical_weights_despite_rounding_differences_in_batches() -> None:
    probes, double = await probes_of(EngineDouble()), EngineDouble()
    add_noise(double, [0.1] * len(probes))
    assert await check(double, probes) == 0.0


async def test_verification_probe_of_identical_weights_passes_when_some_batches_include_other_requests() -> None:
    probes, double = await probes_of(EngineDouble()), EngineDouble()
    add_noise(double, [0.1] * len(probes) + [0.2, 0.1])
    assert await check(double, probes) == 0.0


async def test_different_weights_fail_verification_after_few_measurements() -> None:
    probes, double = await probes_of(EngineDouble()), EngineDouble(probe_noise=0.1)
    with pytest.raises(ProbeError, match=r"probe 1 of 2 differs by 0\.1000 nats"):
        await check(double, probes)
    assert len(double.requests) == len(probes) + 5


async def test_verification_fails_if_there_are_no_probes() -> None:
    with pytest.raises(ProbeError, match="has no reference log-probabilities"):
        await check(EngineDouble(), [])


async def test_verification_fails_even_if_only_one_probe_fails() -> None:
    good, other = await probes_of(EngineDouble())
    bad = other.model_copy(update={"logprobs": tuple(value - 1 for value in other.logprobs)})
    with pytest.raises(ProbeError, match="probe 2 of 2"):
        await check(EngineDouble(), [good, bad])


async def test_probe_sequences_are_measured_one_at_a_time() -> None:
    double = EngineDouble()
    running: list[int] = []
    double.on_call = lambda path: running.append(double.running)
    async with client_of(double) as client:
        measured = await measure_probes(client, SEQUENCES, repeats=3)
    assert running == [0] * 6
    assert [[len(logprobs) for logprobs in run] for run in measured] == [[2, 2]] * 3


def test_probe_tolerance_is_the_minimum_when_all_measurements_are_equal() -> None:
    probes = make_probes(SEQUENCES[:1], [[(-1.0, -2.0)], [(-1.0, -2.0)]], FACTS)
    assert probes[0].tolerance == MIN_TOLERANCE == 1e-3


def test_probe_tolerance_is_twice_the_measured_noise() -> None:
    probes = make_probes(SEQUENCES[:1], [[(-1.0, -2.0)], [(-1.0, -2.01)], [(-1.02, -2.0)]], FACTS)
    assert probes[0].logprobs == (-1.0, -2.0)
    assert probes[0].tolerance == pytest.approx(0.04)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("run", [0, 1])
def test_creating_a_probe_from_non_finite_measurements_fails(value: float, run: int) -> None:
    measured = [[(-1.0, -2.0)], [(-1.0, -2.0)]]
    measured[run] = [(-1.0, value)]
    with pytest.raises(ProbeError, match="non-finite"):
        make_probes(SEQUENCES[:1], measured, FACTS)


logprobs = st.floats(-20, 0)


@given(st.lists(st.tuples(logprobs, logprobs), min_size=1, max_size=6))
def test_probe_tolerance_is_wide_enough_for_every_measurement_of_the_probe(runs: list[tuple[float, float]]) -> None:
    probe = make_probes(SEQUENCES[:1], [[run] for run in runs], FACTS)[0]
    assert probe.tolerance >= MIN_TOLERANCE
    for run in runs:
        assert all(abs(a - b) <= probe.tolerance for a, b in zip(run, probe.logprobs, strict=True))


tokens = st.lists(st.integers(0, 50_000), min_size=1, max_size=150)


@pytest.mark.slow
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=40), st.integers(1, MAX_PROBES))
def test_verification_probes_are_a_few_short_excerpts_of_prompts_and_their_answers(
    pairs: list[tuple[list[int], list[int]]], count: int
) -> None:
    chosen = choose_sequences(pairs, count)
    assert 1 <= len(chosen) <= count
    for token_ids, start in chosen:
        assert 2 <= len(token_ids) <= MAX_TOKENS
        assert 1 <= start < len(token_ids)
        prompt, answer = tuple(token_ids[:start]), tuple(token_ids[start:])
        assert any(tuple(p)[-start:] == prompt and tuple(a)[: len(answer)] == answer for p, a in pairs)


def test_probe_sequences_are_spread_across_the_held_out_set() -> None:
    pairs = [([number], [number]) for number in range(16)]
    assert [token_ids[0] for token_ids, _ in choose_sequences(pairs, 4)] == [0, 4, 8, 12]


@pytest.mark.parametrize(
    "change",
    [
        {"logprobs": (-1.0,)},
        {"tolerance": 1e-4},
        {"tolerance": math.inf},
        {"tolerance": math.nan},
        {"token_ids": tuple(range(65)), "logprobs": tuple(-1.0 for _ in range(63))},
        {"token_ids": (1, -2, 3, 4)},
        {"start": 0},
        {"start": 4, "logprobs": ()},
        {"note": "x"},
    ],
)
def test_verification_probe_with_invalid_fields_is_rejected(change: dict[str, object]) -> None:
    good = {"token_ids": (1, 2, 3, 4), "start": 2, "logprobs": (-1.0, -2.0), "tolerance": 1e-3, "engine": FACTS}
    Probe.model_validate(good)
    with pytest.raises(ValidationError):
        Probe.model_validate(good | change)


def facts_of(
    folder: Path, capabilities: DeviceCapabilities = AVX512, config: Mapping[str, Any] | None = None, **settings: Any
) -> EngineFacts:
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16"} | dict(config or {})))
    return engine_facts(EngineSettings(**settings), capabilities, folder)


GPTQ: dict[str, Any] = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


def test_engine_facts_differ_between_compiled_and_eager_execution(tmp_path: Path) -> None:
    eager, compiled = (facts_of(tmp_path, args=(value,)) for value in ("--enforce-eager", "--no-enforce-eager"))
    assert eager != compiled
    assert eager == facts_of(tmp_path)


def test_engine_facts_include_dtype_and_kernel(tmp_path: Path) -> None:
    merged, gptq = facts_of(tmp_path, AVX2), facts_of(tmp_path, AVX2, GPTQ)
    assert (merged.dtype, merged.kernel) == ("float32", GptqKernel.VLLM)
    assert (gptq.dtype, gptq.kernel) == ("bfloat16", GptqKernel.TORCH)
    assert facts_of(tmp_path, AMX, GPTQ) != facts_of(tmp_path, AMX, GPTQ, gptq_kernel=GptqKernel.TORCH)
    assert facts_of(tmp_path) != facts_of(tmp_path, args=("--dtype", "float32"))


def test_engines_that_compute_in_different_dtypes_count_as_different_kinds() -> None:
    wide = FACTS.model_copy(update={"dtype": "float32"})
    assert wide.key != FACTS.key
    assert EngineFacts.model_validate_json(wide.key) == wide
