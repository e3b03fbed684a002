"""Tests that weights, gradients and moments are really sharded across two processes over gloo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from svc.engine.device import NumberType
from trainer.data.chat_template import IGNORED
from trainer.model.load import ModelForm, load_model
from trainer.recipe.adapter import Quantization
from trainer.training import loss
from trainer.training.loss import answer_loss
from trainer.training.parallel.device_group import DeviceGroup
from trainer.training.parallel.device_processes import run_on_devices
from trainer.training.parallel.devices import TrainingDevice
from trainer.training.parallel.processes import Place
from trainer.training.parallel.sharding import (
    check_sharded,
    gather_trained,
    load_optimizer_state,
    shard_model,
    whole,
    whole_optimizer_state,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

DEVICES = (TrainingDevice("the CPU"),) * 2
Shape = tuple[int, ...]
Arrays = dict[str, Any]
"""numpy's arrays: the memory of tensors would end with the process that sends them."""


@dataclass
class Seen:
    """Shapes and values in one process.

    Attributes:
        shapes: shape of each weight, of its share, and of the shares of its gradient and first moment.
        outside_steps: bytes of weights between two steps.
    """

    shapes: dict[str, list[Shape]]
    outside_steps: int
    loss: float
    gradients: Arrays
    weights: Arrays
    saved: Arrays
    moments: Arrays
    reloaded: bool


def load(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(5, 29).reshape(2, 12)
    labels = ids.clone()
    labels[:, :4] = IGNORED
    return ids, labels


def step(model: PreTrainedModel) -> tuple[float, torch.optim.Optimizer]:
    """Make a step on a batch that both processes have, so that the mean of their gradients is that of one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    total = answer_loss(model, *rows())
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return total.item(), optimizer


def observe(place: Place, base: Path) -> Seen:
    """Train in one of two processes. Answers are scored in parts, which are computed again for their gradients."""
    loss._LOGITS_AT_ONCE = 5 * 600
    with DeviceGroup.joined(place, sharded=True) as group:
        model = load(base)
        shard_model(model, group.size, NumberType.FLOAT32, full=True)
        check_sharded(model, group.size)
        total, optimizer = step(model)
        shapes: dict[str, list[Shape]] = {}
        first = group.rank == 0
        for name, weight in model.named_parameters():
            assert isinstance(weight, DTensor)
            parts = (weight, weight.grad, optimizer.state[weight]["exp_avg"])
            shapes[name] = [tuple(weight.shape), *(tuple(part.to_local().shape) for part in parts)]
        gradients = {name: whole(weight.grad, keep=first).numpy() for name, weight in model.named_parameters()}
        weights = {name: whole(weight, keep=first).numpy() for name, weight in model.named_parameters()}
        outside = sum(weight.to_local().nbytes for weight in model.parameters())
        state = whole_optimizer_state(optimizer, keep=True)
        fresh = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        load_optimizer_state(fresh, state)
        reloaded = all(
            torch.equal(value.to_local(), optimizer.state[weight][name].to_local())
            for weight in model.parameters()
            for name, value in fresh.state[weight].items()
            if isinstance(value, DTensor)
        )
        names = [name for name, _ in model.named_parameters()]
        moments = {name: state["state"][number]["exp_avg"].numpy() for number, name in enumerate(names)}
        gather_trained(model, keep=first)
        saved = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
        assert type(model).__name__ == type(load(base)).__name__
        return Seen(shapes, outside, total, gradients, weights, saved, moments, reloaded)


def test_two_processes_each_store_half_of_the_training_state_and_compute_the_same_step(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = run_on_devices(DEVICES, observe, (tiny_base,), {})
    model = load(tiny_base)
    total, optimizer = step(model)
    for name, (shape, *shares) in first.shapes.items():
        own = (-(-shape[0] // 2), *shape[1:])
        assert shares == [own] * 3, name
        rest = (shape[0] - own[0], *shape[1:])
        assert second.shapes[name][1:] == [rest] * 3, name
    half = sum(weight.nbytes for weight in model.parameters()) / 2
    assert [first.outside_steps, second.outside_steps] == pytest.approx([half, half], rel=0.01)
    assert [first.loss, second.loss] == pytest.approx([total, total], rel=1e-6)
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        np.testing.assert_allclose(first.gradients[name], weight.grad.numpy(), atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(first.moments[name], optimizer.state[weight]["exp_avg"].numpy(), atol=1e-6)
        np.testing.assert_array_equal(first.saved[name], first.weights[name])
        assert second.saved[name].size == 0
    assert first.reloaded
    assert second.reloaded


def observe_packed(place: Place, base: Path) -> tuple[dict[str, Shape], Arrays, str]:
    """Return the shapes of this process's shares of the weights in NF4, the gathered ones, and the type of the first
    layer's projection after it computed.
    """
    with DeviceGroup.joined(place, sharded=True) as group:
        model = load_model(base, ModelForm(NumberType.FLOAT32, Quantization.NF4, divided=True))
        model.requires_grad_(False)
        shard_model(model, group.size, NumberType.FLOAT32, full=False)
        check_sharded(model, group.size)
        packed = {name: weight for name, weight in model.named_parameters() if weight.dtype is torch.uint8}
        shares = {name: tuple(weight.to_local().shape) for name, weight in packed.items()}
        gathered = {name: whole(weight, keep=group.rank == 0).numpy() for name, weight in packed.items()}
        with torch.no_grad():
            model(rows()[0])
        return shares, gathered, type(model.model.layers[0].self_attn.q_proj.weight).__name__


def test_two_processes_each_store_half_of_an_nf4_weight_and_gather_identical_bytes(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (shares, gathered, kept), (others, *_) = run_on_devices(DEVICES, observe_packed, (tiny_base,), {})
    model = load_model(tiny_base, ModelForm(NumberType.FLOAT32, Quantization.NF4))
    packed = {name: weight for name, weight in model.named_parameters() if weight.dtype is torch.uint8}
    assert packed.keys() == gathered.keys()
    for name, weight in packed.items():
        assert shares[name] == others[name] == (len(weight) // 2, 1)
        np.testing.assert_array_equal(gathered[name], weight.numpy())
    assert kept == "DTensor"  # a share again, not the gathered weight
