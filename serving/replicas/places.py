"""The numbers of a home's engines: each is one engine's, of whichever model; its folder and its log are named so."""

import asyncio
import itertools

from serving.replicas.slots import EngineSlots


class EnginePlaces:
    """Gives each engine a number that no other has."""

    def __init__(self, slots: EngineSlots) -> None:
        self._slots = slots
        self._taken: set[int] = set()

    def take(self, number: int | None = None) -> int:
        """Takes a place.

        Args:
            number: that of an orphan; None for the lowest that is free.

        Raises:
            ValueError: another engine has it.
        """
        if number is None:
            number = next(number for number in itertools.count() if number not in self._taken)
        elif number in self._taken:
            raise ValueError(f"place {number} is taken")
        self._taken.add(number)
        return number

    def give_back(self, number: int) -> None:
        """Its engine has ended."""
        self._taken.discard(number)

    async def orphans(self) -> list[int]:
        """The places of engines that an earlier server left, and that nobody has taken."""
        return [number for number in await asyncio.to_thread(self._slots.numbers) if number not in self._taken]

    async def end_orphans(self) -> None:
        """Ends those that nobody has taken."""
        for number in await self.orphans():
            await asyncio.to_thread(self._slots.end, number)
