"""Shards a model's weights across the devices that train it, with PyTorch's `fully_shard` (FSDP2).

Each device stores a shard of every weight, and of its gradient and moments. The weights of a decoder layer are gathered
before the layer is computed, and released afterwards. The embeddings and the output head stay gathered from their first
use in a step to the end of its backward pass. The same mechanism runs over gloo on CPUs and NCCL on GPUs.

Weights in NF4 are sharded and gathered as the bytes that bitsandbytes packed them into. Each device has all scales (3%
of the packed weights), which bitsandbytes stores outside the parameters.

Every function here that gathers must be called by all processes in the same order. Imports torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from svc.engine.device import NumberType
from svc.errors import TrainingError
from trainer.training.mechanisms import checkpointed_layers

_ORIGINAL_CLASS = 2
"""Index of a module's original class in the method resolution order of the class that `fully_shard` creates in
its place."""


def shard_model(model: nn.Module, devices: int, number_type: NumberType, *, full: bool) -> None:
    """Shard a model's weights across all processes, and move the shards to the processes' devices layer by layer. All
    processes must have the same weights.

    Trained weights are stored and updated in float32. With full fine-tuning in 16 bits, the weights of layers are
    gathered in 16 bits: autocast would otherwise keep a rounded copy of each layer until its backward pass.

    Args:
        model: a model in main memory.
        number_type: data type of the matrix products.
        full: whether every weight is trained.

    Raises:
        TrainingError: the model has no layers that can be gathered one after another.
    """
    layers = checkpointed_layers(model)
    if not layers:
        raise TrainingError(
            f"{type(model).__name__} has no layers whose weights can be gathered one layer at a time",
            expected="a model whose layers support gradient checkpointing",
            todo="set train.sharding to never",
        )
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (devices,))
    policy = MixedPrecisionPolicy()
    if full and number_type is not NumberType.FLOAT32:
        narrow = getattr(torch, number_type)
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        _widen(layer)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    _widen(model)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _widen(module: nn.Module) -> None:
    for weight in module.parameters():
        if weight.requires_grad and weight.dtype is not torch.float32:
            weight.data = weight.data.to(torch.float32)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of a model are sharded across devices."""
    return isinstance(model, FSDPModule)


def check_sharded(model: nn.Module, devices: int) -> None:
    """Check that each process stores only its shard of every weight.

    Raises:
        TrainingError: a weight is stored in full, or is sharded in a different way.
    """
    wrong = {
        f"{name} is stored as {_described(weight)}"
        for name, weight in model.named_parameters()
        if not isinstance(weight, DTensor)
        or weight.placements != (Shard(0),)
        or weight.device_mesh.size() != devices
        or len(weight.to_local()) > -(-len(weight) // devices)
    }
    if wrong or not is_sharded(model):
        raise TrainingError(
            f"the weights are not sharded across {devices} devices: {min(wrong, default='FSDP is not applied')}",
            expected=f"about 1/{devices} of every weight on each device",
            todo="set train.sharding to never, or install the versions in deploy/constraints",
        )


def _described(weight: Tensor) -> str:
    if not isinstance(weight, DTensor):
        return f"a whole tensor of shape {tuple(weight.shape)}"
    return f"{tuple(weight.to_local().shape)} of {tuple(weight.shape)}, {weight.placements}"


def release_gathered(model: nn.Module) -> None:
    """Release the gathered embeddings and output head after a forward pass that is not followed by a backward pass, so
    that later changes to the shards take effect.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(value: Tensor, *, keep: bool) -> Tensor:
    """Gather a tensor into main memory. If it is not sharded, it is only copied there.

    Args:
        keep: whether this process needs the result. If not, an empty tensor is returned.
    """
    gathered = value.detach()
    if isinstance(gathered, DTensor):
        gathered = gathered.full_tensor()
    return gathered.cpu().contiguous() if keep else torch.empty(0)


@torch.no_grad()
def copy_into(weight: Tensor, values: Tensor) -> None:
    """Set a weight to the given values. If the weight is sharded, only this process's shard of the values is used."""
    if isinstance(weight, DTensor):
        weight.to_local().copy_(_share(values, weight).to_local())
    else:
        weight.copy_(values)


def _share(values: Tensor, weight: DTensor) -> DTensor:
    """Shard `values` in the same way as `weight`. Each process passes the complete tensor and keeps its own shard."""
    local = values.to(weight.device)
    return distribute_tensor(local, weight.device_mesh, weight.placements, src_data_rank=None)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Gather the state of an optimizer into main memory, in the form that it would have with unsharded weights.

    Args:
        keep: whether this process needs the result.
    """
    state: dict[str, Any] = optimizer.state_dict()
    state["state"] = {
        number: {
            name: whole(value, keep=keep) if isinstance(value, Tensor) else value for name, value in moments.items()
        }
        for number, moments in state["state"].items()
    }
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a complete optimizer state, such as `whole_optimizer_state` returns. For sharded weights, each process loads
    only its own shards of the state.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    shares = {
        number: {
            name: _share(value, weights[number])
            if isinstance(weights[number], DTensor) and value.shape == weights[number].shape
            else value
            for name, value in moments.items()
        }
        for number, moments in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": shares})


@torch.no_grad()
def gather_trained(model: nn.Module, *, keep: bool, converted: Callable[[Tensor], Tensor] | None = None) -> None:
    """Make a sharded model ready to be saved, by replacing the shards of its trained weights with complete weights in
    main memory. Afterwards, the model cannot be used for computation.

    Weights are gathered one after the other, in the order of `model.parameters()`.

    Args:
        keep: whether this process saves the model. If not, its trained weights become empty.
        converted: function that is applied to each complete weight.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    gathered: dict[int, nn.Parameter] = {}
    for weight in model.parameters():
        if weight.requires_grad:
            values = whole(weight, keep=keep)
            values = values if converted is None or not keep else converted(values)
            gathered[id(weight)] = nn.Parameter(values)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(weight) in gathered:
                setattr(module, name, gathered[id(weight)])
    for module in model.modules():
        if isinstance(module, FSDPModule):  # else saving would try to gather weights again
            module.__class__ = type(module).__mro__[_ORIGINAL_CLASS]
