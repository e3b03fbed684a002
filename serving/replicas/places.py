"""The numbers of a home's engines, unique across models; an engine's folder and log are named by its number."""

import asyncio
import itertools

from serving.replicas.slots import EngineSlots


class EnginePlaces:
    """Gives each engine a unique number."""

    def __init__(self, slots: EngineSlots) -> None:
        self._slots = slots
        self._taken: set[int] = set()

    def take(self, number: int | None = None) -> int:
        """Take a number and return it.

        Args:
            number: an orphaned engine's number; None for the lowest free number.

        Raises:
            ValueError: another engine has this number.
        """
        if number is None:
            number = next(number for number in itertools.count() if number not in self._taken)
        elif number in self._taken:
            raise ValueError(f"engine number {number} is taken")
        self._taken.add(number)
        return number

    def give_back(self, number: int) -> None:
        """Release the number of an engine that has stopped."""
        self._taken.discard(number)

    async def orphans(self) -> list[int]:
        """Return the numbers of engines that an earlier server left running and this server has not taken."""
        return [number for number in await asyncio.to_thread(self._slots.numbers) if number not in self._taken]

    async def end_orphans(self) -> None:
        """Stop the engines that an earlier server left running and this server has not taken."""
        for number in await self.orphans():
            await asyncio.to_thread(self._slots.end, number)
