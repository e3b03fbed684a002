"""Verifies that training got into the weights, by comparing every tensor of what was written with the base's.

A merge that silently does nothing gives a version that answers like the base; a merge that touches more than the
adapter names gives one that nobody trained. What full fine-tuning wrote is compared in the same way. Knows nothing of
quality: whether the change is a good one is for the evaluation to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import TrainingError
from svc.terminal import waiting
from trainer.library_output import library_output_to_log
from trainer.model.layer_shapes import expert_names, layer_widths

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What training changed.

    Attributes:
        modules: linear layers, and parameters of experts, that changed.
        smallest_changed_share: share of weights that differ, in the layer where it is smallest. A learnt change that
            is finer than bf16 is rounded away, so that it is below 1.
        largest_change: largest difference of one weight.
    """

    modules: int
    smallest_changed_share: float
    largest_change: float


def verify_full(base: Path, trained: Path) -> MergeSummary:
    """The same for a model of which every weight was trained.

    Args:
        base: folder of the base model.
        trained: folder of what became of it.

    Raises:
        TrainingError: a linear layer or an expert's parameter has the base's weights still.
    """
    with waiting("Comparing the trained weights with the base's"), library_output_to_log():
        learnt = {*layer_widths(base), *expert_names(base)}
        return compare_folders(base, trained, learnt, others_change=True)


def adapted_tensors(model: "PeftModel") -> dict[str, str]:
    """What an adapter changes: a linear layer or a parameter of experts, by the name of the adapter's own layer."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):  # one around the other for each parameter of a module
            found[name] = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        elif isinstance(module, BaseTunerLayer):
            found[name] = name
    return found


def compare_folders(base: Path, merged: Path, targets: set[str], *, others_change: bool = False) -> MergeSummary:
    """Compare the weights of two model folders, one tensor at a time; see `compare_weights`."""
    from trainer.model.stored_weights import StoredWeights

    return compare_weights(StoredWeights(base), StoredWeights(merged), targets, others_change=others_change)


def compare_weights(
    base: "Mapping[str, torch.Tensor]",
    merged: "Mapping[str, torch.Tensor]",
    targets: set[str],
    *,
    others_change: bool = False,
) -> MergeSummary:
    """Raise unless the targeted modules' weights differ, and no others. Each tensor is looked up once, in turn.

    Args:
        base, merged: tensors by parameter name.
        targets: modules that the adapter names, as `model.layers.0.mlp.up_proj`, or parameters.
        others_change: embeddings, norms and biases may differ too.

    Raises:
        TrainingError: names the first module that is wrong.
    """
    expected = {name if name in base else f"{name}.weight" for name in targets}
    if unknown := sorted(expected - set(base)):
        raise merge_failed(f"the adapter targets {unknown[0]!r}, which the base model does not have")
    if set(base) != set(merged):
        raise merge_failed(f"tensor {min(set(base) ^ set(merged))!r} is in only one of base and merged model")
    changes = []
    for name in sorted(expected if others_change else base):
        before, after = base[name], merged[name]
        if name in expected:
            changes.append(_change(name, before, after))
        elif not before.equal(after):
            raise merge_failed(f"tensor {name!r} differs from the base's, and the adapter does not target it")
    if not changes:
        raise merge_failed("the adapter targets no module")
    shares, largest = zip(*changes, strict=True)
    return MergeSummary(len(changes), min(shares), max(largest))


def _change(name: str, before: "torch.Tensor", after: "torch.Tensor") -> tuple[float, float]:
    """Return the share of weights that differ and the largest difference; raise where there is none."""
    differing = int((before != after).sum())
    if not differing:
        raise merge_failed(f"module {name.removesuffix('.weight')!r} still has the base's weights")
    return differing / before.numel(), float((before - after).abs().max())


def merge_failed(wrong: str) -> TrainingError:
    """The error of a merge that did not do what it must."""
    return TrainingError(
        f"the merge did not do what it must: {wrong}",
        expected="every module that the adapter targets changes, and nothing else",
        todo="check that the adapter was trained on this base and that its training loss fell",
    )
