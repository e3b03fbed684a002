"""Tests the checks that a version must pass before clients may use it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.engines.verification import UnknownProbesError, Verification, find_retaken_probes
from svc.engine.probes import EngineFacts
from svc.errors import IntegrityError, ProbeError
from svc.version import Format, Target
from tests.serving.control import Control, Make
from tests.serving.engine_double import EngineDouble
from tests.serving.versions import FACTS, OTHER_FACTS, make_version, target


def kind_of(facts: EngineFacts) -> Callable[[Path], EngineFacts]:
    """Return a function that returns the same engine facts for every folder."""
    return lambda folder: facts


@pytest.fixture
async def elsewhere(make: Make) -> AsyncIterator[Control]:
    """Yield version 1 on another engine kind than the one that qualified it, with slightly different rounding."""
    control = make(facts=OTHER_FACTS)

    def prepare(double: EngineDouble) -> None:
        double.probe_noise = 0.01

    control.park.prepare = prepare
    async with control.run():
        yield control


async def test_version_folder_is_returned_if_its_files_are_unaltered(make: Make) -> None:
    control = make()
    folder = await Verification(control.registry, control.store, kind_of(FACTS)).files(target(1))
    assert folder == control.registry.folder(target(1).version) / "merged"


async def test_slow_hashing_does_not_block_the_default_executor(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default executor also runs the status and every read from the store."""
    control, free = make(), threading.Event()
    monkeypatch.setattr(control.registry, "verify", lambda version, format: free.wait(5))
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    verification = Verification(control.registry, control.store, kind_of(FACTS))
    hashing = [asyncio.create_task(verification.files(target(number))) for number in (1, 2, 3)]
    try:
        await asyncio.sleep(0.05)
        async with asyncio.timeout(1):
            await asyncio.to_thread(time.sleep, 0)
    finally:
        free.set()
    await asyncio.gather(*hashing)


async def test_altered_file_raises_integrity_error(make: Make) -> None:
    control = make()
    (control.registry.folder(target(1).version) / "merged" / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(IntegrityError, match="was changed after registration"):
        await Verification(control.registry, control.store, kind_of(FACTS)).files(target(1))


async def test_probe_difference_within_the_tolerance_passes(control: Control) -> None:
    control.double.probe_noise = 0.0009
    verification = Verification(control.registry, control.store, kind_of(FACTS))
    checked = await verification.probes(control.park.engines[-1], target(1), fresh=False)
    assert checked.verified and checked.found.startswith("1 probes passed")


async def test_probe_difference_beyond_the_tolerance_raises_probe_error(control: Control) -> None:
    control.double.probe_noise = 0.0011
    with pytest.raises(ProbeError):
        await Verification(control.registry, control.store, kind_of(FACTS)).probes(
            control.park.engines[-1], target(1), fresh=True
        )


async def test_probes_recorded_for_a_different_version_raise_probe_error(control: Control) -> None:
    with pytest.raises(ProbeError):
        await Verification(control.registry, control.store, kind_of(FACTS)).probes(
            control.park.engines[-1], target(2), fresh=True
        )


async def test_probes_are_recorded_again_and_stored_for_a_new_engine_kind(elsewhere: Control) -> None:
    stored = find_retaken_probes(elsewhere.store, target(1), OTHER_FACTS)
    assert stored is not None
    assert [probe.engine for probe in stored] == [OTHER_FACTS]
    assert find_retaken_probes(elsewhere.store, target(1), FACTS) is None


async def test_stored_verification_probes_are_checked_on_the_next_load(elsewhere: Control) -> None:
    verification = Verification(elsewhere.registry, elsewhere.store, kind_of(OTHER_FACTS))
    checked = await verification.probes(elsewhere.park.engines[-1], target(1), fresh=False)
    assert "probes passed" in checked.found
    elsewhere.double.probe_noise = 0.02
    with pytest.raises(ProbeError):
        await verification.probes(elsewhere.park.engines[-1], target(1), fresh=False)


async def test_no_probes_are_recorded_if_the_engine_was_not_started_with_the_version(elsewhere: Control) -> None:
    """After a reload without effect, probes would be recorded for the wrong weights, however similar."""
    sibling = make_version(elsewhere.registry, 4, probes_of=elsewhere.double.weights)
    verification = Verification(elsewhere.registry, elsewhere.store, kind_of(OTHER_FACTS))
    wanted = Target(sibling, Format.MERGED)
    with pytest.raises(UnknownProbesError, match="was not started with that version"):
        await verification.probes(elsewhere.park.engines[-1], wanted, fresh=False)
    assert find_retaken_probes(elsewhere.store, wanted, OTHER_FACTS) is None


@pytest.mark.parametrize(("number", "known"), [(1, True), (2, False)])
async def test_version_has_usable_probes_only_if_they_were_recorded_on_the_same_kind_of_engine(
    elsewhere: Control, number: int, known: bool
) -> None:
    verification = Verification(elsewhere.registry, elsewhere.store, kind_of(OTHER_FACTS))
    assert await verification.has_probes(target(number)) is known


async def test_verification_probes_measured_on_unexpected_weights_are_not_stored(elsewhere: Control) -> None:
    verification = Verification(elsewhere.registry, elsewhere.store, kind_of(OTHER_FACTS))
    with pytest.raises(ProbeError, match="not the version's weights"):
        await verification.probes(elsewhere.park.engines[-1], target(2), fresh=True)
    assert find_retaken_probes(elsewhere.store, target(2), OTHER_FACTS) is None


async def test_verification_probes_with_nan_are_rejected(elsewhere: Control) -> None:
    elsewhere.double.probe_noise = float("nan")
    verification = Verification(elsewhere.registry, elsewhere.store, kind_of(OTHER_FACTS))
    with pytest.raises(ProbeError):
        await verification.probes(elsewhere.park.engines[-1], target(2), fresh=True)


async def test_version_without_probes_fails_verification(control: Control) -> None:
    make_version(control.registry, 4, probes=False)
    with pytest.raises(ProbeError, match="has no reference log-probabilities"):
        await Verification(control.registry, control.store, kind_of(FACTS)).probes(
            control.park.engines[-1], target(4), fresh=True
        )
