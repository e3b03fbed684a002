"""Tests that retaken probes belong to one version, in one format, on one engine kind."""

import pytest
from sqlalchemy import Engine as Store

from serving.engines.verification import find_retaken_probes, keep_retaken_probes
from svc.engine.probes import EngineFacts, Probe
from svc.settings.engine import Device, GptqKernel
from svc.version import Format, Target, VersionId
from tests.builders.requests import TARGET

FACTS = EngineFacts(
    vllm="0.32.0",
    device=Device.CPU,
    instruction_set="x86_64-avx2",
    mode="eager",
    dtype="bfloat16",
    kernel=GptqKernel.VLLM,
)


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


def probe(logprob: float) -> Probe:
    return Probe(token_ids=(1, 2), start=1, logprobs=(logprob,), tolerance=0.001, engine=FACTS)


def test_stored_probes_round_trip_exactly(store: Store) -> None:
    probes = (probe(-0.1234567890123456), probe(-1e-300))
    keep_retaken_probes(store, TARGET, FACTS, probes)
    assert find_retaken_probes(store, TARGET, FACTS) == probes


@pytest.mark.parametrize(
    ("target", "facts"),
    [
        (Target(VersionId("tiny", 3), Format.GPTQ), FACTS),
        (Target(VersionId("other", 2), Format.GPTQ), FACTS),
        (Target(VersionId("tiny", 2), Format.MERGED), FACTS),
        (TARGET, FACTS.model_copy(update={"vllm": "0.33.0"})),
        (TARGET, FACTS.model_copy(update={"mode": "compiled"})),
        (TARGET, FACTS.model_copy(update={"instruction_set": "x86_64-avx512f"})),
        (TARGET, FACTS.model_copy(update={"device": Device.CUDA})),
    ],
)
def test_remeasured_probes_apply_only_to_the_engine_kind_and_target_they_were_measured_for(
    store: Store, target: Target, facts: EngineFacts
) -> None:
    keep_retaken_probes(store, TARGET, FACTS, (probe(-1.0),))
    assert find_retaken_probes(store, target, facts) is None


def test_remeasured_verification_probes_replace_those_measured_before(store: Store) -> None:
    keep_retaken_probes(store, TARGET, FACTS, (probe(-1.0),))
    keep_retaken_probes(store, TARGET, FACTS, (probe(-2.0),))
    assert find_retaken_probes(store, TARGET, FACTS) == (probe(-2.0),)
