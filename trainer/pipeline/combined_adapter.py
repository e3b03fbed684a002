"""Combines adapters of the same base into a version's adapter, in place of training.

Adapters that PEFT cannot combine, or would combine differently from what the recipe says, are rejected. The check
reads only configs and tensor headers, and runs before the base's weights are read.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from svc.dataset.prompt_hashes import TRAINED_PROMPTS_FILE, hash_prompts, read_prompt_hashes
from svc.dataset.schema.example import ChatExample
from svc.errors import BaseModelError, NotFoundError, RecipeError
from svc.registry.registry import Registry
from svc.terminal import console
from svc.version import Format, VersionId
from trainer.base_model.resolve import Base
from trainer.pipeline.trained_adapter import TrainedAdapter, complete_recipe, find_adapter
from trainer.recipe.adapter import MAX_RANK, AdapterType
from trainer.recipe.combine import Combine, CombineMethod
from trainer.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class CombinedAdapter:
    """Adapters that are combined into a single adapter.

    Attributes:
        parts: the adapters, in the order of the recipe.
        bases: revision of the base on which each registered version among the parts was trained, keyed by version.
        rank: rank of the result.
        seed: random seed that determines which values DARE drops.
    """

    combine: Combine
    parts: tuple[TrainedAdapter, ...]
    bases: dict[str, str]
    rank: int
    seed: int

    @property
    def digest(self) -> str:
        """Hash of everything that affects the result, except the base."""
        weights = [(part.digest, given.weight) for part, given in zip(self.parts, self.combine.adapters, strict=True)]
        content = [self.combine.method, self.combine.density, weights, self.rank, self.seed]
        return f"sha256:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"

    def describe(self, recipe: Recipe) -> Recipe:
        """Return a recipe completed with the type, rank, alpha and layers of the combined adapter. The adapter's
        scale, alpha / rank, is 1.

        Raises:
            RecipeError: the recipe sets one of these keys to a different value.
        """
        values = {
            "adapter.type": AdapterType.LORA,
            "adapter.rank": self.rank,
            "adapter.alpha": self.rank,
            "adapter.rslora": False,
            "adapter.targets": tuple(
                sorted({layer.rpartition(".")[2] for part in self.parts for layer in part.layers})
            ),
        }
        return complete_recipe(recipe, values, f"the combination by {self.combine.method}")

    def warnings(self, base: str) -> list[str]:
        """Return warnings about adapters whose config names a base other than the given one."""
        return [warning for part in self.parts if (warning := part.check_base(base)) and part.origin not in self.bases]

    def check_revision(self, base: Base) -> None:
        """Check that each adapter that is a registered version was trained on exactly the given base.

        Raises:
            BaseModelError: a version was trained on another base.
        """
        for version, revision in self.bases.items():
            if revision != base.revision:
                raise BaseModelError(
                    f"{version} was trained on a different base than {base.origin} ({revision[:19]}, not "
                    f"{base.revision[:19]})",
                    expected="adapters that were trained on the same base with the same chat template",
                    todo=f"run `svc show {version}` to see the base of this version",
                )

    def copy_to(self, out: Path, base: Path) -> None:
        """Write the combined adapter to a new folder. The same adapters and options give the same files.

        Raises:
            RecipeError: PEFT cannot combine the adapters.
        """
        from trainer.library_output import library_output_to_log

        with library_output_to_log():
            from trainer.model.combine import LoraPart, combine_adapters

            given = zip(self.parts, self.combine.adapters, strict=True)
            parts = [LoraPart(part.folder, part.config, part.layers, item.weight) for part, item in given]
            try:
                combine_adapters(base, parts, self.combine, out, rank=self.rank, seed=self.seed)
            except ValueError as error:
                raise RecipeError(f"PEFT cannot combine the adapters: {error}", todo="choose another method") from error


def find_combined(recipe: Recipe, combine: Combine, cache: Path, registry: Registry) -> CombinedAdapter:
    """Return the adapters that a recipe combines.

    Args:
        cache: folder for downloads.

    Raises:
        RecipeError: PEFT cannot combine the adapters with this method.
        BaseModelError: an adapter does not exist, or its type is not supported.
        NotFoundError: a version does not exist or has no adapter.
        IntegrityError: a file is damaged.
    """
    parts, bases = [], {}
    for item in combine.adapters:
        part = _find_version(item.adapter, registry) if item.adapter in combine.versions else None
        if part:
            bases[item.adapter] = registry.manifest(VersionId.parse(item.adapter)).base.revision
        part = part or find_adapter(item.adapter, cache)
        if reason := _refusal(part):
            raise RecipeError(
                f"{part.origin} cannot be combined: {reason}",
                expected="a LoRA or rsLoRA adapter with the same rank and scale in all layers",
                todo="remove this adapter from adapter.combine.adapters",
            )
        parts.append(part)
    return CombinedAdapter(combine, tuple(parts), bases, _rank(recipe, combine, parts), recipe.train.seed)


def _find_version(name: str, registry: Registry) -> TrainedAdapter:
    """Return the adapter of a registered version, after checking its hashes."""
    version = VersionId.parse(name)
    if Format.ADAPTER not in registry.manifest(version).formats:
        raise NotFoundError(
            f"{version} has no adapter",
            expected="a version whose formats include `adapter`",
            todo="choose another version",
        )
    registry.verify(version, Format.ADAPTER)
    return replace(find_adapter(str(registry.artifact(version, Format.ADAPTER).absolute()), Path()), origin=name)


def _refusal(part: TrainedAdapter) -> str | None:
    """Return the reason why PEFT cannot combine an adapter with others, or None if it can.

    For example, PEFT would ignore the magnitudes of a DoRA adapter. If an adapter's layers have different ranks, PEFT
    would write matrices that do not match the ranks in the config.
    """
    reasons = {
        "use_dora": "it is DoRA",
        "target_parameters": "it changes a mixture's experts",
        "rank_pattern": "its layers have different ranks",
        "alpha_pattern": "its layers have different scales",
    }
    return next((reason for key, reason in reasons.items() if part.config.get(key)), None)


def _rank(recipe: Recipe, combine: Combine, parts: Sequence[TrainedAdapter]) -> int:
    """Return the rank of the combined adapter.

    Raises:
        RecipeError: the method needs equal ranks, or the rank is too large.
    """
    method, ranks = combine.method, [part.config["r"] for part in parts]
    if method.needs_equal_ranks and len(set(ranks)) > 1:
        names = ", ".join(f"{part.origin} {rank}" for part, rank in zip(parts, ranks, strict=True))
        with_svd = "svd" if method is CombineMethod.LINEAR else f"{method}_svd"
        raise RecipeError(
            f"adapter.combine.method is {method}, but the adapters have different ranks: {names}",
            expected="equal ranks",
            todo=f"set adapter.combine.method to {with_svd}, or to {CombineMethod.CAT} for the exact weighted sum",
        )
    rank: int = sum(ranks) if method is CombineMethod.CAT else max(ranks)
    if method.factorizes:
        rank = recipe.adapter.rank or rank
    if rank > MAX_RANK:
        raise RecipeError(
            f"with adapter.combine.method: {method}, the combined adapter would have rank {rank}",
            expected=f"at most {MAX_RANK}",
            todo=f"set adapter.combine.method to {CombineMethod.SVD}, and adapter.rank to at most {MAX_RANK}",
        )
    return rank


def warn_learnt(registry: Registry, versions: Sequence[str], heldout: Sequence[ChatExample]) -> None:
    """Warn if any of the versions to be combined was trained on held-out prompts."""
    prompts = hash_prompts(heldout)
    for name in versions:
        try:
            learnt = read_prompt_hashes(registry.reference(VersionId.parse(name), TRAINED_PROMPTS_FILE))
        except NotFoundError:  # an imported adapter
            continue
        if count := int(np.isin(prompts, learnt).sum()):
            console.print(
                f"[yellow]{name} was trained on {count} of {len(heldout)} held-out prompts: the evaluation "
                "will be too optimistic[/yellow]"
            )
