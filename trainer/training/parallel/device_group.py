"""The processes that train one model together, one on each device. Imports torch.

All processes make the same calls in the same order. Decisions that could differ between processes, such as whether a
signal was received or a checkpoint is due, are therefore made by the first process.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from signal import Signals
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, check_cuda_p2p_ib_support
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from svc.errors import InterruptedRunError, TrainingError
from trainer.callbacks.preemption import Preemption, StepAbandoned
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.parallel.processes import Call, Listens, Place
from trainer.training.parallel.sharding import check_sharded

_GRADIENTS_TIMEOUT = timedelta(minutes=30)
"""Maximum time that a process waits for the gradients of the other processes. The caller notices within seconds if a
process dies, so this limit only stops a run in which a process hangs."""
_TIMEOUT = timedelta(hours=3)
"""Maximum time that a process waits for the first process, which writes and uploads checkpoints."""

Value = TypeVar("Value")
Row = TypeVar("Row")


class DeviceGroup:
    """The group of processes that train a model together, as seen by one of them. A group of one process needs no
    communication.

    Attributes:
        rank: index of this process and its device, starting at 0.
        size: number of processes.
        sharded: whether each process stores only a share of the model, not a copy.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, sharded: bool = False) -> None:
        self.rank = rank
        self.size = size
        self.sharded = sharded and size > 1
        self._control: Any = None

    @classmethod
    @contextmanager
    def joined(cls, place: Place, *, sharded: bool = False) -> Iterator["DeviceGroup"]:
        """Connect this process to the other processes of its group for the duration of the `with` block, and yield its
        group.
        """
        group = cls(place.rank, place.size, sharded=sharded)
        if place.size == 1:
            yield group
            return
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if not check_cuda_p2p_ib_support():  # accelerate would refuse them
                os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=place.meeting,
            rank=place.rank,
            world_size=place.size,
            timeout=_GRADIENTS_TIMEOUT,
        )
        group._control = distributed.new_group(backend="gloo", timeout=_TIMEOUT)
        try:
            yield group
        except InterruptedRunError:  # raised in all processes
            group._leave()
            raise
        group._leave()

    def _leave(self) -> None:
        self.wait()
        distributed.destroy_process_group()

    def agree(self, value: Value) -> Value:
        """Broadcast the first process's value to all processes, and return it."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, src=0, group=self._control)
        agreed: Value = values[0]
        return agreed

    def wait(self) -> None:
        """Wait until every process has called this method."""
        if self.size > 1:
            distributed.barrier(group=self._control)

    def gather(self, value: Value) -> list[Value]:
        """Exchange a value among all processes, and return the values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._control)
        return values

    def spread(self, value: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
        """Broadcast the first process's tensor to all processes, and return it.

        Args:
            value: a float32 tensor in main memory. Only the first process's tensor is used.
            shape: shape of the tensor.
        """
        spread = torch.empty(shape) if value is None else value.contiguous()
        if self.size > 1:
            distributed.broadcast(spread, src=0, group=self._control)
        return spread

    def map(self, work: Callable[[Sequence[Row]], list[Value]], rows: Sequence[Row]) -> list[Value]:
        """Divide rows among the processes. Every process returns the results for all rows.

        Args:
            work: function that returns a result for each row.
        """
        shares = self.gather(work(rows[self.rank :: self.size]))
        return [shares[number % self.size][number // self.size] for number in range(len(rows))]

    def check(self, accelerator: Accelerator, model: torch.nn.Module) -> None:
        """Check that all processes train the same model.

        If a library does not support a setting on a device, it silently ignores the setting; each process would then
        train a model of its own.

        Raises:
            TrainingError: the processes do not train the same model.
        """
        if self.size == 1:
            return
        expected = DistributedType.MULTI_GPU if torch.cuda.is_available() else DistributedType.MULTI_CPU
        actual = f"{accelerator.distributed_type}, num_processes={accelerator.num_processes}, {type(model).__name__}"
        wrapper: type[torch.nn.Module] = FSDPModule if self.sharded else DistributedDataParallel
        if (
            accelerator.distributed_type is not expected
            or accelerator.num_processes != self.size
            or not isinstance(model, wrapper)
        ):
            raise TrainingError(
                f"the installed version of accelerate does not train on several devices: {actual}",
                expected=f"{expected}, num_processes={self.size}, {wrapper.__name__}",
                todo="set train.devices to 1, or install the versions in deploy/constraints",
            )
        if self.sharded:
            check_sharded(model, self.size)


ALONE = DeviceGroup()
"""The group of a process that trains alone."""


class Caller:
    """Connection of a process to its caller (trainer.training.parallel.processes). Only the first process uses it.

    Args:
        preemption: receives the caller's signals.
    """

    def __init__(self, place: Place, preemption: Preemption) -> None:
        self._pipe = place.pipe
        self._preemption = preemption
        self._answers: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._receive, name="caller", daemon=True).start()

    def call(self, name: str, *arguments: Any) -> None:
        """Ask the calling process to run one of its functions, and wait until the function has returned."""
        self._pipe.send(Call(name, arguments))
        self._answers.get()

    def listen(self) -> None:
        """Tell the caller that this process is now ready to receive signals."""
        self._pipe.send(Listens())

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                message = self._pipe.recv()
                if message is None:
                    self._answers.put(None)
                else:
                    self._preemption.receive(message)


class GroupPreemption(Preemption):
    """A stop signal that all processes of a group handle at the same point.

    A process cannot abandon a step at an arbitrary point, because the other processes wait for its gradients. A signal
    takes effect before the next batch.
    """

    def __init__(self, group: DeviceGroup) -> None:
        super().__init__()
        self._group = group
        self._received: Signals | None = None

    def receive(self, by: Signals) -> None:
        """Record a signal. Only the first process receives it."""
        self._received = by

    def agreed(self, value: Value) -> Value:
        """Broadcast the first process's value to all processes, and return it. This also informs all processes of a
        received signal.
        """
        value, by = self._group.agree((value, self._received))
        self.by = self.by or by
        return value

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Run the `with` block, unless a signal was received.

        Raises:
            StepAbandoned: a signal was received before the block.
        """
        self.agreed(None)
        if self.by is not None:
            raise StepAbandoned(self.by.name)
        yield


class GroupCheckpoints(CheckpointFolder):
    """The checkpoints of a training run on several devices. Each process adds its own files to a checkpoint, which the
    first process completes.
    """

    def __init__(
        self, group: DeviceGroup, folder: Path, keep: int, on_written: Callable[[Path], None] | None = None
    ) -> None:
        super().__init__(folder, keep, on_written)
        self._group = group

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint on this machine.

        Raises:
            TrainingError: another process has a different newest checkpoint, so the processes would not take the same
                steps.
        """
        newest = super().newest()
        steps = self._group.gather(newest.name if newest else "none")
        if len(set(steps)) > 1:
            raise TrainingError(
                f"the processes disagree on the newest checkpoint: {', '.join(steps)}",
                expected="the same checkpoint on all machines",
                todo="run the same command again, unless another machine is training this run",
            )
        return newest

    @contextmanager
    def writing(self, step: int, best: int | None = None) -> Iterator[Path]:
        """Yield a temporary folder for a new checkpoint. All processes except the first write only small files, which
        are sent to the first process, because it may be on another machine.
        """
        if self._group.rank == 0:
            with super().writing(step, best) as temporary:
                yield temporary
                for files in self._group.gather(dict[str, bytes]()):
                    for name, content in files.items():
                        (temporary / name).write_bytes(content)
        else:
            with tempfile.TemporaryDirectory(prefix="checkpoint-") as own:
                yield Path(own)
                self._group.gather({path.name: path.read_bytes() for path in Path(own).iterdir()})
        self._group.wait()  # until the checkpoint is complete


def devices_of(checkpoint: Path) -> int:
    """Return the number of devices on which a checkpoint was trained. Each device has its own random
    state in the checkpoint.
    """
    return len(list(checkpoint.glob("rng_state_*.pth"))) or 1
