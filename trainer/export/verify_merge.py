"""Checks which weights training changed, by comparing every written tensor with the base's tensor.

If a merge silently does nothing, the version answers like the base; if other tensors change, the version differs from
the trained model. The output of full fine-tuning is compared in the same way. Quality is measured by the evaluation,
not here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import TrainingError
from svc.terminal import waiting
from trainer.library_output import library_output_to_log
from trainer.model.experts import fused_experts
from trainer.model.layer_shapes import linear_layers

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """How training changed the weights.

    Attributes:
        modules: number of changed linear layers and expert parameters.
        smallest_changed_share: smallest share of changed weights in any layer. It is below 1, because learned
            changes smaller than the precision of bf16 may be rounded away.
        largest_change: largest change of a single weight.
    """

    modules: int
    smallest_changed_share: float
    largest_change: float


def verify_full(base: Path, trained: Path) -> MergeSummary:
    """Verify a fully fine-tuned model and return how its weights changed.

    Args:
        base: folder of the base model.
        trained: folder of the trained model.

    Raises:
        TrainingError: a linear layer or an expert parameter still has the base's weights.
    """
    from trainer.model.stored_weights import StoredWeights

    with waiting("Comparing the trained weights with the base weights"), library_output_to_log():
        before = StoredWeights(base)
        learnt = {*linear_layers(before.model), *fused_experts(before.model)}
        return compare_weights(before, StoredWeights(trained), learnt, others_change=True)


def adapted_tensors(model: "PeftModel") -> dict[str, str]:
    """Return the linear layers and expert parameters that an adapter changes, keyed by the names of the
    adapter's layers.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):  # nested, one for each parameter of a module
            adapted[name] = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            adapted[name] = name
    return adapted


def compare_weights(
    base: "Mapping[str, torch.Tensor]",
    merged: "Mapping[str, torch.Tensor]",
    targets: set[str],
    *,
    others_change: bool = False,
    rows: Mapping[str, Sequence[int]] | None = None,
) -> MergeSummary:
    """Check that exactly the targeted weights differ, and return a summary of the changes. Tensors are looked
    up one at a time.

    Args:
        base, merged: tensors keyed by parameter name.
        targets: modules, such as `model.layers.0.mlp.up_proj`, or parameters that training must have
            changed.
        others_change: whether embeddings, norms and biases may differ too.
        rows: rows that must have changed, keyed by parameter. All other rows of these parameters must be unchanged.

    Raises:
        TrainingError: a targeted module is unchanged, or another tensor differs; the message names the first such
            tensor.
    """
    expected = {name if name in base else f"{name}.weight" for name in targets}
    if unknown := sorted(expected - set(base)):
        raise merge_failed(f"the adapter targets {unknown[0]!r}, which is missing from the base model")
    if set(base) != set(merged):
        raise merge_failed(
            f"tensor {min(set(base) ^ set(merged))!r} is present in only one of the base and merged models"
        )
    changes = []
    for name in sorted(expected if others_change else base):
        before, after = base[name], merged[name]
        if rows and name in rows:
            changes.append(_change_of_rows(name, before, after, rows[name]))
        elif name in expected:
            changes.append(_change(name, before, after))
        elif not before.equal(after):
            raise merge_failed(f"tensor {name!r} differs from the base model's, but the adapter does not target it")
    if not changes:
        raise merge_failed("the adapter targets no module")
    shares, largest = zip(*changes, strict=True)
    return MergeSummary(len(changes), min(shares), max(largest))


def _change(name: str, before: "torch.Tensor", after: "torch.Tensor") -> tuple[float, float]:
    """Return the share of weights that differ and the largest difference. Raise TrainingError if no weight
    differs.
    """
    differing = int((before != after).sum())
    if not differing:
        raise merge_failed(f"module {name.removesuffix('.weight')!r} still has the base model's weights")
    return differing / before.numel(), float((before - after).abs().max())


def _change_of_rows(
    name: str, before: "torch.Tensor", after: "torch.Tensor", rows: Sequence[int]
) -> tuple[float, float]:
    """Return the share of weights in the given rows that differ, and the largest difference. Raise TrainingError if
    no weight in these rows differs, or if any weight in another row differs.
    """
    differing = set((before != after).any(dim=1).nonzero().flatten().tolist())
    if other := sorted(differing - set(rows)):
        raise merge_failed(
            f"row {other[0]} of {name!r} differs from the base model's, but does not belong to a new token"
        )
    return _change(name, before[list(rows)], after[list(rows)])


def merge_failed(wrong: str) -> TrainingError:
    return TrainingError(
        f"the merge is wrong: {wrong}",
        expected="a merge that changes every module that the adapter targets, and no other tensor",
        todo="check that the adapter was trained on this base and that its training loss fell",
    )
