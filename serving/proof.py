"""Proves that the engine runs a version's weights: hashes before the load, probes after it."""

import asyncio
import logging
from pathlib import Path

from sqlalchemy import Engine as Store

from svc.engine.client import EngineClient
from svc.engine.probe import EngineFacts, Probe, check_probes, make_probes, measure_probes
from svc.registry.registry import Registry
from svc.store.desired import Target
from svc.store.retaken_probes import find_retaken_probes, keep_retaken_probes

log = logging.getLogger(__name__)

_RETAKE_REPEATS = 5


class Proof:
    """What a version must show before a client may reach it.

    Args:
        facts: the kind of engine that runs here.
    """

    def __init__(self, registry: Registry, store: Store, facts: EngineFacts) -> None:
        self._registry = registry
        self._store = store
        self._facts = facts

    async def files(self, target: Target) -> Path:
        """Checks the hashes of a version's files and returns its model folder.

        Raises:
            NotFoundError: no such version or format.
            IntegrityError: a file was changed.
        """
        await asyncio.to_thread(self._registry.verify, target.version, target.format)
        return self._registry.artifact(target.version, target.format)

    async def probes(self, client: EngineClient, target: Target) -> str:
        """Checks the probes on the engine, all at once.

        A kind of engine that has not seen this version yet has nothing to be compared with: there the probes are
        taken again, and every later load is held against them.

        Returns:
            What was found, for the journal.

        Raises:
            ProbeError: the engine runs other weights.
        """
        recorded = self._registry.format(target.version, target.format).probes
        known = tuple(probe for probe in recorded if probe.engine == self._facts)
        if recorded and not known:
            retaken = await asyncio.to_thread(find_retaken_probes, self._store, target, self._facts)
            if retaken is None:
                return await self._retake(client, target, recorded)
            known = retaken
        difference = await check_probes(client, known)
        return f"{len(known)} probes passed, largest difference {difference:.4f} nats"

    async def _retake(self, client: EngineClient, target: Target, recorded: tuple[Probe, ...]) -> str:
        sequences = [(probe.token_ids, probe.start) for probe in recorded]
        measured = await measure_probes(client, sequences, repeats=_RETAKE_REPEATS)
        probes = make_probes(sequences, measured, self._facts)
        await asyncio.to_thread(keep_retaken_probes, self._store, target, self._facts, probes)
        log.warning("%s was qualified on another kind of engine (%s): probes taken again", target, recorded[0].engine)
        return f"{len(probes)} probes taken again: this kind of engine sees the version for the first time"
