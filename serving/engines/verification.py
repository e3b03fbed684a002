"""Verifies that the engine runs a version's weights: checks the hashes of the files and, after the load, the probes.

A probe is a text with recorded log-probabilities, which the loaded engine must reproduce.

A version's probes are short token sequences with the log-probabilities by which the loaded weights are recognized. They
are first recorded when the version is qualified. Another kind of engine rounds differently, so it needs its own values.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from serving.engines.adapter_cache import Checked
from serving.engines.served_model import ServedModel, require_fit, served_model
from svc.engine.client import EngineClient
from svc.engine.engine import Engine
from svc.engine.probes import MIN_TOLERANCE, EngineFacts, Probe, check_probes, make_probes, measure_probes
from svc.errors import ProbeError
from svc.registry.adapter import AdapterFacts, read_adapter
from svc.registry.registry import Registry
from svc.settings.engine import AdapterSettings
from svc.store.database import exclusive
from svc.store.tables import RetakenProbesRow, target_columns
from svc.version import SERVED_FORMATS, Format, Target, VersionId

log = logging.getLogger(__name__)

_HASHING_THREADS = 4  # some may be busy with comparisons of superseded promotions
_RETAKE_REPEATS = 5
_ADAPTER_REPEATS = 2
"""Number of times each probe is measured when an adapter is first used. It is small because a request is waiting."""
_OTHER_WEIGHTS_NATS = 0.5
"""Mean difference between log-probabilities, in nats, above which the weights must be different. With the same weights,
results of different kernels differ in the second decimal place; with different weights, they differ by whole nats."""
_PROBES = TypeAdapter(tuple[Probe, ...])


def find_retaken_probes(store: Store, target: Target, facts: EngineFacts) -> tuple[Probe, ...] | None:
    """Return a version's probes as measured on the given kind of engine, or None if they were not measured there."""
    with Session(store) as session:
        row = session.get(RetakenProbesRow, target_columns(target) | {"engine": facts.key})
        return _PROBES.validate_json(row.probes) if row else None


def keep_retaken_probes(store: Store, target: Target, facts: EngineFacts, probes: tuple[Probe, ...]) -> None:
    """Store remeasured probes, so that later loads on this kind of engine can be checked against them."""
    text = _PROBES.dump_json(probes).decode("utf-8")
    with exclusive(store) as session:
        session.merge(RetakenProbesRow(**target_columns(target), engine=facts.key, probes=text))


class UnknownProbesError(ProbeError):
    """Raised when a version has no probes for this kind of engine and none can be recorded on this engine."""


@dataclass(eq=False)
class Verification:
    """Checks that an engine runs a version before clients may use it.

    Attributes:
        facts_of: function that returns the kind of engine that would serve a given model folder on this
            machine.
        adapters: settings for versions that are served as adapters.
    """

    registry: Registry
    store: Store
    facts_of: Callable[[Path], EngineFacts]
    adapters: AdapterSettings = field(default_factory=AdapterSettings)

    def __post_init__(self) -> None:
        # Hashing takes minutes for large models, and would block the shared threads.
        self._hashing = ThreadPoolExecutor(max_workers=_HASHING_THREADS, thread_name_prefix="hashing")

    async def model(self, target: Target) -> ServedModel:
        """Return the model that an engine loads when it is started to serve a target, without verifying the model.

        Raises:
            NotFoundError, RefusedError, IntegrityError: see serving.engines.served_model.
        """
        return await asyncio.to_thread(served_model, self.registry, target, self.adapters)

    async def adapter(self, version: VersionId, model: ServedModel) -> AdapterFacts:
        """Return a version's adapter without verifying its files.

        Args:
            model: model of the engine that will apply the adapter.

        Raises:
            NotFoundError, RefusedError, IntegrityError: the adapter is missing, or the engine cannot apply it.
        """
        adapter = await asyncio.to_thread(read_adapter, self.registry, version)
        require_fit(model, adapter)
        return adapter

    async def registered(self, name: str) -> set[VersionId]:
        """Return the registered versions of a model name."""
        return set(await asyncio.to_thread(self.registry.versions, name))

    async def folder(self, target: Target) -> Path:
        """Return a version's model folder without verifying it.

        Raises:
            NotFoundError: there is no such version or format.
        """
        return await asyncio.to_thread(self.registry.artifact, target.version, target.format)

    async def files(self, target: Target) -> Path:
        """Verify the hashes of a version's files, and return its model folder.

        Raises:
            NotFoundError: there is no such version or format.
            IntegrityError: a file has been changed.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._hashing, self.registry.verify, target.version, target.format)
        return await self.folder(target)

    async def probes(self, engine: Engine, target: Target, *, fresh: bool) -> Checked:
        """Check all probes on the engine concurrently, and return the result.

        If this kind of engine has not run the version before, there are no probes to compare with. New probes are then
        recorded, and every later load is compared with them. Probes can differ less between two versions of the same
        base than between two kinds of engine, so a load that had no effect could go unnoticed. Probes are therefore
        recorded only on engines that were started with the version's files. For the same reason, an engine that cannot
        be probed is only accepted for the version it was started with.

        Args:
            fresh: whether the engine was newly started with the version's files, rather than already running.

        Raises:
            UnknownProbesError: the engine was already running, and there are no probes for it or it cannot be
                probed.
            ProbeError: the engine runs different weights.
        """
        if why := engine.capabilities.unprobed:
            return _unprobed(target, why, fresh=fresh)
        client, recorded, facts = engine.client, await self._recorded(target), await self.facts(target)
        known = await self._known(target, recorded, facts)
        if known is None and fresh:
            return Checked(await self._retake(client, target, recorded, facts))
        if known is None:
            raise UnknownProbesError(
                f"no reference log-probabilities (probes) are recorded for {target} on this kind of engine, and they "
                "cannot be recorded now, because this engine was not started with that version",
                expected=f"probes from {facts.key}",
                todo="start an engine with this version to record its probes",
            )
        return await _compared(client, known)

    async def adapter_probes(self, engine: Engine, name: str, target: Target) -> Checked:
        """Check a loaded adapter with probes, as `probes` does. This also works while requests are running.

        Registration records no probes for adapters. When an adapter is first loaded on a kind of engine, its results
        are therefore compared with the probes of the version's complete model and with the base's results.

        Args:
            name: the adapter's name in the engine.

        Raises:
            ProbeError: the engine applies a different adapter, or none.
        """
        if why := engine.capabilities.unprobed:
            return _unverified(target, why)
        reference, facts = await self._reference(target), await self.facts(target)
        if not reference:
            return _unverified(target, "the version has no probes in any format")
        adapter = engine.client.named(name)
        known = await asyncio.to_thread(find_retaken_probes, self.store, target, facts)
        if known is None:
            return Checked(await self._retake(adapter, target, reference, facts, without=engine.client))
        return await _compared(adapter, known)

    async def _reference(self, target: Target) -> tuple[Probe, ...]:
        """Return the recorded probes of the version's merged format, or else of one of its quantized formats."""
        formats = (await asyncio.to_thread(self.registry.manifest, target.version)).formats
        recorded = (formats[format].probes for format in reversed(SERVED_FORMATS) if format in formats)
        return next((probes for probes in recorded if probes), ())

    async def has_probes(self, target: Target) -> bool:
        """Return whether a version can be verified after it has been loaded into a running engine.

        If it cannot, an engine must be started from the version's files.

        Raises:
            EngineError: the format cannot be served on this machine.
            NotFoundError: there is no such version or format.
        """
        return await self._known(target, await self._recorded(target), await self.facts(target)) is not None

    async def _recorded(self, target: Target) -> tuple[Probe, ...]:
        return (await asyncio.to_thread(self.registry.format, target.version, target.format)).probes

    async def _known(self, target: Target, recorded: tuple[Probe, ...], facts: EngineFacts) -> tuple[Probe, ...] | None:
        """Return a version's probes for a kind of engine, or None if no such probes have been recorded.

        The probes were recorded either at registration or later.
        """
        known = tuple(probe for probe in recorded if probe.engine == facts)
        if known or not recorded:
            return known
        return await asyncio.to_thread(find_retaken_probes, self.store, target, facts)

    async def facts(self, target: Target) -> EngineFacts:
        """Return the kind of engine that serves a version in a given format on this machine.

        Raises:
            EngineError: the format cannot be served on this machine.
            NotFoundError: there is no such version or format.
        """
        return await asyncio.to_thread(self.facts_of, (await self.model(target)).folder)

    async def _retake(
        self,
        client: EngineClient,
        target: Target,
        recorded: tuple[Probe, ...],
        facts: EngineFacts,
        *,
        without: EngineClient | None = None,
    ) -> str:
        """Measure a version's probes on this kind of engine, store them, and return a message for the journal.

        Args:
            without: client that sends requests to the base model in the same engine; needed if `client` sends requests
                to an adapter.
        """
        sequences = [(probe.token_ids, probe.start) for probe in recorded]
        repeats = _ADAPTER_REPEATS if without else _RETAKE_REPEATS
        measured = await measure_probes(client, sequences, repeats=repeats)
        _refuse_other_weights(recorded, measured[0])
        if without is not None:
            base = await asyncio.gather(*(without.logprobs(token_ids, start) for token_ids, start in sequences))
            _refuse_base(recorded, measured[0], base)
        probes = make_probes(sequences, measured, facts)
        await asyncio.to_thread(keep_retaken_probes, self.store, target, facts, probes)
        if without is None:
            log.warning(
                "%s was qualified on another kind of engine (%s); its reference log-probabilities (probes) were "
                "recorded again on this engine",
                target,
                recorded[0].engine,
            )
        return (
            f"{len(probes)} probes recorded again, because the version runs on this kind of engine for the first time"
        )


def _unverified(target: Target, why: str) -> Checked:
    log.warning("cannot verify by probes that the engine runs %s: %s", target, why)
    return Checked(f"not verified: {why}", verified=False)


def _unprobed(target: Target, why: str, *, fresh: bool) -> Checked:
    """Return the check's result for an engine that cannot be probed, but was started from files with verified hashes.

    Raises:
        UnknownProbesError: the engine was already running, and may run different weights.
    """
    if not fresh:
        raise UnknownProbesError(
            f"cannot verify that the engine runs {target}: {why}",
            expected="an engine newly started with this version, or one that can be verified with probes",
            todo="start a new engine with this version",
        )
    return _unverified(target, why)


async def _compared(client: EngineClient, known: Sequence[Probe]) -> Checked:
    difference = await check_probes(client, known)
    return Checked(f"{len(known)} probes passed, largest difference {difference:.4f} nats")


def _refuse_other_weights(recorded: Sequence[Probe], measured: Sequence[Sequence[float]]) -> None:
    """Check that newly measured log-probabilities match the version's probes, before they become its reference.

    If the load had no effect, the engine still has other weights, which must not determine the reference.

    Raises:
        ProbeError: the difference is larger than the same weights can produce on two kinds of engine.
    """
    difference = _mean_difference([probe.logprobs for probe in recorded], measured)
    if not difference <= _OTHER_WEIGHTS_NATS:  # also true for NaN
        raise ProbeError(
            f"the log-probabilities of the probes differ from the recorded ones by {difference:.2f} nats on average: "
            "the loaded weights are not the version's weights",
            expected=f"an average difference of at most {_OTHER_WEIGHTS_NATS} nats between log-probabilities on two "
            "kinds of engine",
            todo="restore the version's folder from a backup, or train the version again on a machine with the same "
            "kind of engine as this one",
        )


def _refuse_base(
    recorded: Sequence[Probe], measured: Sequence[Sequence[float]], base: Sequence[Sequence[float]]
) -> None:
    """Check that the engine applies the adapter, before the measured probes become the version's reference.

    Raises:
        ProbeError: the engine's log-probabilities match the base model rather than the version.
    """
    own = _mean_difference([probe.logprobs for probe in recorded], measured)
    if own > MIN_TOLERANCE >= _mean_difference(base, measured):
        raise ProbeError(
            "the adapter is not applied: the probes' log-probabilities equal those of the base, and differ from the "
            f"version's by {own:.4f} nats on average",
            expected=f"log-probabilities within {MIN_TOLERANCE} nats of the version's, or more than {MIN_TOLERANCE} "
            "nats from the base's",
            todo=f"serve the version with --format {Format.MERGED}",
        )


def _mean_difference(expected: Sequence[Sequence[float]], measured: Sequence[Sequence[float]]) -> float:
    pairs = [pair for left, right in zip(expected, measured, strict=True) for pair in zip(left, right, strict=True)]
    return sum(abs(left - right) for left, right in pairs) / len(pairs)
