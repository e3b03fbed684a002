"""Facts about a version's training run, such as its machine and duration. They are informational only."""

import platform

from pydantic import BaseModel, ConfigDict

from svc.engine.device import cpu_identity
from svc.engine.machine import read_machine

RUN_RECORD_FILE = "run.json"
"""Name of the run record file in a version's reference folder."""


class MachineRecord(BaseModel):
    """The machine on which a version was created.

    Attributes:
        processor: name of the processor, as reported by the kernel.
        cores: number of logical cores available to the process that wrote the record.
        memory: memory available to that process, in bytes.
        gpus: names of the GPUs available to that process.
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
        """Return a record of the current machine."""
        machine = read_machine(gpus=True)
        models = (line.partition(":")[2].strip() for line in cpu_identity() if line.startswith("model name"))
        return cls(
            processor=next(models, platform.machine()),
            cores=len(machine.cores),
            memory=machine.memory,
            gpus=tuple(gpu.name for gpu in machine.gpus),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
        )


class RunRecord(BaseModel):
    """Measurements of a version's training run.

    Attributes:
        machine: machine that registered the version or, for a run on a cluster, a node of the same kind as the nodes
            that ran the stages. Stages of an interrupted run may have run on other machines.
        number_type: data type in which matrix products are computed.
        steps: number of optimizer steps.
        tokens: number of prompt and answer tokens trained on, without padding.
        tokens_per_second, seconds: speed and duration of the optimization, as measured by the process that
            finished it.
        best_step: step that the version's weights come from, if the recipe requests the best weights instead
            of the last ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: MachineRecord
    number_type: str
    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    best_step: int | None = None
