"""Verifies that the engine runs a version's weights: hashes of its files, probes after the load."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlalchemy import Engine as Store

from svc.engine.probes import EngineFacts, Probe, check_probes, make_probes, measure_probes
from svc.engine.vllm.client import EngineClient
from svc.errors import ProbeError
from svc.registry.registry import Registry
from svc.store.retaken_probes import find_retaken_probes, keep_retaken_probes
from svc.version import Target

log = logging.getLogger(__name__)

_RETAKE_REPEATS = 5
_OTHER_WEIGHTS_NATS = 0.5
"""Mean difference. Kernels differ in the second decimal, other weights by whole nats."""


class UnknownProbesError(ProbeError):
    """No probes of this kind of engine are known for a version, and this engine cannot give any."""


class Verification:
    """What a version must show before a client may reach it.

    Args:
        facts: the kind of engine that serves a model folder here.
    """

    def __init__(self, registry: Registry, store: Store, facts: Callable[[Path], EngineFacts]) -> None:
        self._registry = registry
        self._store = store
        self._facts = facts

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
        await asyncio.to_thread(self._registry.verify, target.version, target.format)
        return await self.folder(target)

    async def probes(self, client: EngineClient, target: Target, *, fresh: bool) -> str:
        """Checks the probes on the engine, all at once.

        A kind of engine that has not seen this version yet has nothing to be compared with: there the probes are
        taken again, and every later load is held against them. Versions of one base can differ by less than two kinds
        of engine, so that a load that did nothing would pass: only an engine that began with the files gives probes.

        Args:
            fresh: the engine was started with the version's files; otherwise it ran before.

        Returns:
            What was found, for the journal.

        Raises:
            UnknownProbesError: they would have to be taken again, in an engine that ran before.
            ProbeError: the engine runs other weights.
        """
        recorded, facts = await self._recorded(target), await self.facts(target)
        known = await self._known(target, recorded, facts)
        if known is None and fresh:
            return await self._retake(client, target, recorded, facts)
        if known is None:
            raise UnknownProbesError(
                f"no probes of this kind of engine are known for {target}, and the engine was not started with it",
                expected=f"probes of {facts.key}",
                todo="start an engine with it: they are taken then",
            )
        difference = await check_probes(client, known)
        return f"{len(known)} probes passed, largest difference {difference:.4f} nats"

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
        return await asyncio.to_thread(self._facts, await self.folder(target))

    async def _retake(
        self, client: EngineClient, target: Target, recorded: tuple[Probe, ...], facts: EngineFacts
    ) -> str:
        sequences = [(probe.token_ids, probe.start) for probe in recorded]
        measured = await measure_probes(client, sequences, repeats=_RETAKE_REPEATS)
        _refuse_other_weights(recorded, measured[0])
        probes = make_probes(sequences, measured, facts)
        await asyncio.to_thread(keep_retaken_probes, self._store, target, facts, probes)
        log.warning("%s was qualified on another kind of engine (%s): probes taken again", target, recorded[0].engine)
        return f"{len(probes)} probes taken again: this kind of engine sees the version for the first time"


def _refuse_other_weights(recorded: Sequence[Probe], measured: Sequence[Sequence[float]]) -> None:
    """Keeps a load that did nothing, or loaded something else, from becoming what the version is held against.

    Raises:
        ProbeError: the difference is more than another kind of engine explains.
    """
    pairs = [
        (expected, found)
        for probe, logprobs in zip(recorded, measured, strict=True)
        for expected, found in zip(probe.logprobs, logprobs, strict=True)
    ]
    difference = sum(abs(expected - found) for expected, found in pairs) / len(pairs)
    if not difference <= _OTHER_WEIGHTS_NATS:  # also what is not a number
        raise ProbeError(
            f"the probes differ by {difference:.2f} nats in the mean: not the version's weights",
            expected=f"at most {_OTHER_WEIGHTS_NATS} between two kinds of engine",
            todo="qualify the version on this kind of engine",
        )
