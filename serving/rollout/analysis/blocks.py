"""Compares candidate and production within short periods, called blocks.

Effects of the time of day, load and outages therefore cancel out.
"""

from dataclasses import dataclass, field

from serving.rollout.analysis.units import Arm


@dataclass(slots=True)
class Block:
    """Observations from one period. A complete block contains at least one unit (such as a user) from each arm.

    At a candidate share of 5%, a block has one candidate unit and about 19 production units.
    """

    production: list[float] = field(default_factory=list)
    candidate: list[float] = field(default_factory=list)

    @property
    def difference(self) -> float:
        """Mean of the candidate's observations minus mean of production's."""
        return sum(self.candidate) / len(self.candidate) - sum(self.production) / len(self.production)


class Blocks:
    """Divides a sequence of observations into blocks. A block ends as soon as it contains an observation of
    each version.

    Attributes:
        open: the block that is not complete yet.
    """

    def __init__(self) -> None:
        self.open = Block()

    def add(self, arm: Arm, value: float) -> Block | None:
        """Add the observation of one unit (such as a user). Return the block that it completes, or None."""
        block = self.open
        if arm is Arm.CANDIDATE:
            block.candidate.append(value)
            complete = block.production
        else:
            block.production.append(value)
            complete = block.candidate
        if not complete:
            return None
        self.open = Block()
        return block
