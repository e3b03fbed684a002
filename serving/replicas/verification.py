"""Verifies that the engine runs a version's weights: hashes of its files, probes after the load."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import Engine as Store

from serving.replicas.adapter_cache import Checked
from serving.replicas.served_model import ServedModel, require_fit, served_model
from svc.engine.client import EngineClient
from svc.engine.engine import Engine
from svc.engine.probes import MIN_TOLERANCE, EngineFacts, Probe, check_probes, make_probes, measure_probes
from svc.errors import ProbeError
from svc.registry.adapter import AdapterFacts, read_adapter
from svc.registry.registry import Registry
from svc.settings import AdapterSettings
from svc.store.retaken_probes import find_retaken_probes, keep_retaken_probes
from svc.version import Format, Target, VersionId

log = logging.getLogger(__name__)

_HASHING_THREADS = 4  # comparisons that newer promotions superseded run on in some of them
_RETAKE_REPEATS = 5
_ADAPTER_REPEATS = 2
"""Of an adapter at its first use, for which a request waits."""
_OTHER_WEIGHTS_NATS = 0.5
"""Mean difference. Kernels differ in the second decimal, other weights by whole nats."""


class UnknownProbesError(ProbeError):
    """No probes of this kind of engine are known for a version, and this engine cannot give any."""


class Verification:
    """What a version must show before a client may reach it.

    Args:
        facts: the kind of engine that serves a model folder here.
        adapters: how versions are served as adapters.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        facts: Callable[[Path], EngineFacts],
        adapters: AdapterSettings | None = None,
    ) -> None:
        self._registry = registry
        self._store = store
        self._facts = facts
        self._adapters = adapters or AdapterSettings()
        # Hashing takes minutes for large models, and would keep the threads that all else shares.
        self._hashing = ThreadPoolExecutor(max_workers=_HASHING_THREADS, thread_name_prefix="hashing")

    async def model(self, target: Target) -> ServedModel:
        """What an engine is started with for a version, unchecked.

        Raises:
            NotFoundError, RefusedError, IntegrityError: see serving.replicas.served_model.
        """
        return await asyncio.to_thread(served_model, self._registry, target, self._adapters)

    async def adapter(self, version: VersionId, model: ServedModel) -> AdapterFacts:
        """A version's adapter, its files unchecked.

        Args:
            model: of the engine that shall apply it.

        Raises:
            NotFoundError, RefusedError, IntegrityError: there is none, or the engine cannot apply it.
        """
        adapter = await asyncio.to_thread(read_adapter, self._registry, version)
        require_fit(model, adapter)
        return adapter

    async def registered(self, name: str) -> set[VersionId]:
        """The versions of a name that there are."""
        return set(await asyncio.to_thread(self._registry.versions, name))

    async def folder(self, target: Target) -> Path:
        """A version's model folder, unchecked.

        Raises:
            NotFoundError: no such version or format.
        """
        return await asyncio.to_thread(self._registry.artifact, target.version, target.format)

    async def files(self, target: Target) -> Path:
        """Checks the hashes of a version's files and returns its model folder.

        Raises:
            NotFoundError: no such version or format.
            IntegrityError: a file was changed.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._hashing, self._registry.verify, target.version, target.format)
        return await self.folder(target)

    async def probes(self, engine: Engine, target: Target, *, fresh: bool) -> Checked:
        """Checks the probes on the engine, all at once.

        A kind of engine that has not seen this version yet has nothing to be compared with: there the probes are
        taken again, and every later load is held against them. Versions of one base can differ by less than two kinds
        of engine, so that a load that did nothing would pass: only an engine that began with the files gives probes.
        For the same reason an engine that cannot be probed may hold only what it began with.

        Args:
            fresh: the engine was started with the version's files; otherwise it ran before.

        Raises:
            UnknownProbesError: they would have to be taken again, in an engine that ran before; or it is not probed.
            ProbeError: the engine runs other weights.
        """
        if why := engine.capabilities.unprobed:
            return _unprobed(target, why, fresh=fresh)
        client, recorded, facts = engine.client, await self._recorded(target), await self.facts(target)
        known = await self._known(target, recorded, facts)
        if known is None and fresh:
            return Checked(await self._retake(client, target, recorded, facts))
        if known is None:
            raise UnknownProbesError(
                f"no probes of this kind of engine are known for {target}, and the engine was not started with it",
                expected=f"probes of {facts.key}",
                todo="start an engine with it: they are taken then",
            )
        return await _compared(client, known)

    async def adapter_probes(self, engine: Engine, name: str, target: Target) -> Checked:
        """Checks a loaded adapter as `probes` does, also beside requests.

        No adapter has probes of its own from its registration: the first time on a kind of engine, it is held against
        those of the version's merged weights, and must not be what the base is.

        Args:
            name: what the engine calls it.

        Raises:
            ProbeError: the engine applies other weights, or none.
        """
        if why := engine.capabilities.unprobed:
            return _unverified(target, why)
        reference, facts = await self._reference(target), await self.facts(target)
        if not reference:
            return _unverified(target, "the version has no probes in any format")
        adapter = engine.client.named(name)
        known = await asyncio.to_thread(find_retaken_probes, self._store, target, facts)
        if known is None:
            return Checked(await self._retake(adapter, target, reference, facts, without=engine.client))
        return await _compared(adapter, known)

    async def _reference(self, target: Target) -> tuple[Probe, ...]:
        """The recorded probes that are nearest to a version's adapter."""
        formats = (await asyncio.to_thread(self._registry.manifest, target.version)).formats
        found = (formats[format].probes for format in (Format.MERGED, Format.GPTQ) if format in formats)
        return next((probes for probes in found if probes), ())

    async def has_probes(self, target: Target) -> bool:
        """Whether a version can be verified in an engine that ran before; if not, one must start with its files.

        Raises:
            EngineError: the format cannot be served here.
            NotFoundError: no such version or format.
        """
        return await self._known(target, await self._recorded(target), await self.facts(target)) is not None

    async def _recorded(self, target: Target) -> tuple[Probe, ...]:
        return (await asyncio.to_thread(self._registry.format, target.version, target.format)).probes

    async def _known(self, target: Target, recorded: tuple[Probe, ...], facts: EngineFacts) -> tuple[Probe, ...] | None:
        """The probes of a kind of engine, of the registration or taken since; None where they are to be taken again."""
        known = tuple(probe for probe in recorded if probe.engine == facts)
        if known or not recorded:
            return known
        return await asyncio.to_thread(find_retaken_probes, self._store, target, facts)

    async def facts(self, target: Target) -> EngineFacts:
        """The kind of engine that serves a version in a format here.

        Raises:
            EngineError: the format cannot be served here.
            NotFoundError: no such version or format.
        """
        return await asyncio.to_thread(self._facts, (await self.model(target)).folder)

    async def _retake(
        self,
        client: EngineClient,
        target: Target,
        recorded: tuple[Probe, ...],
        facts: EngineFacts,
        *,
        without: EngineClient | None = None,
    ) -> str:
        """Takes probes again, and keeps them.

        Args:
            without: asks the same engine for what it gives without the adapter that `client` asks for.
        """
        sequences = [(probe.token_ids, probe.start) for probe in recorded]
        repeats = _ADAPTER_REPEATS if without else _RETAKE_REPEATS
        measured = await measure_probes(client, sequences, repeats=repeats)
        _refuse_other_weights(recorded, measured[0])
        if without is not None:
            base = await asyncio.gather(*(without.logprobs(token_ids, start) for token_ids, start in sequences))
            _refuse_base(recorded, measured[0], base)
        probes = make_probes(sequences, measured, facts)
        await asyncio.to_thread(keep_retaken_probes, self._store, target, facts, probes)
        if without is None:
            log.warning(
                "%s was qualified on another kind of engine (%s): probes taken again", target, recorded[0].engine
            )
        return f"{len(probes)} probes taken again: this kind of engine sees the version for the first time"


def _unverified(target: Target, why: str) -> Checked:
    log.warning("%s is not verified: %s", target, why)
    return Checked(f"not verified: {why}", verified=False)


def _unprobed(target: Target, why: str, *, fresh: bool) -> Checked:
    """What an engine that cannot be probed is taken for: it holds the files, whose hashes were compared, if any.

    Raises:
        UnknownProbesError: it ran before, and may hold something else.
    """
    if not fresh:
        raise UnknownProbesError(
            f"nothing can tell whether an engine that ran holds {target}: {why}",
            expected="an engine that was started with the version, or one that can be probed",
            todo="start an engine with it",
        )
    return _unverified(target, why)


async def _compared(client: EngineClient, known: Sequence[Probe]) -> Checked:
    difference = await check_probes(client, known)
    return Checked(f"{len(known)} probes passed, largest difference {difference:.4f} nats")


def _refuse_other_weights(recorded: Sequence[Probe], measured: Sequence[Sequence[float]]) -> None:
    """Keeps a load that did nothing, or loaded something else, from becoming what the version is held against.

    Raises:
        ProbeError: the difference is more than another kind of engine explains.
    """
    difference = _mean_difference([probe.logprobs for probe in recorded], measured)
    if not difference <= _OTHER_WEIGHTS_NATS:  # also what is not a number
        raise ProbeError(
            f"the probes differ by {difference:.2f} nats in the mean: not the version's weights",
            expected=f"at most {_OTHER_WEIGHTS_NATS} between two kinds of engine",
            todo="qualify the version on this kind of engine",
        )


def _refuse_base(
    recorded: Sequence[Probe], measured: Sequence[Sequence[float]], base: Sequence[Sequence[float]]
) -> None:
    """Keeps an adapter that the engine took, and does not apply, from becoming what it is held against.

    Raises:
        ProbeError: the engine gives what it gives without it, which is not what the version gives.
    """
    own = _mean_difference([probe.logprobs for probe in recorded], measured)
    if own > MIN_TOLERANCE >= _mean_difference(base, measured):
        raise ProbeError(
            f"the probes are those of the base, {own:.4f} nats from the version's in the mean: it is not applied",
            expected=f"at most {MIN_TOLERANCE} nats from the version's, or more than that from the base's",
            todo=f"serve the version with --format {Format.MERGED}",
        )


def _mean_difference(expected: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> float:
    pairs = [pair for one, other in zip(expected, found, strict=True) for pair in zip(one, other, strict=True)]
    return sum(abs(one - other) for one, other in pairs) / len(pairs)
