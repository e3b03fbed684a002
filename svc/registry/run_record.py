"""Record of a version's training: machine and time, stored with it for information only."""

import platform
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from svc.engine.machine import read_machine

RUN_RECORD_FILE = "run.json"
"""In a version's reference folder."""
_CPUS = Path("/proc/cpuinfo")


class MachineRecord(BaseModel):
    """The machine.

    Attributes:
        processor: as the kernel names it.
        cores: logical ones that this process may use.
        memory: that it may use, bytes.
        gpus: names of GPUs that it may use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str
    cores: int
    memory: int
    gpus: tuple[str, ...]
    system: str
    python: str

    @classmethod
    def of_this_one(cls) -> "MachineRecord":
        """Return the record of this machine."""
        machine = read_machine(gpus=True)
        return cls(
            processor=_processor(),
            cores=len(machine.cores),
            memory=machine.memory,
            gpus=tuple(gpu.name for gpu in machine.gpus),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
        )


class RunRecord(BaseModel):
    """The training.

    Attributes:
        machine: that registered the version; stages of an interrupted run may have run elsewhere.
        number_type: of matrix products.
        steps: of the optimizer.
        tokens: prompt and answer tokens seen, without padding.
        tokens_per_second, seconds: of the optimizer's run, in the process that finished it.
        best_step: the step of these weights, if the best ones were requested.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: MachineRecord
    number_type: str
    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    best_step: int | None = None


def _processor() -> str:
    try:
        lines = _CPUS.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
