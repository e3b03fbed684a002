"""What an engine is started with for a version in a format, and which adapters fit beside it."""

from dataclasses import dataclass
from pathlib import Path

from svc.engine.vllm.lora import LARGEST_RANK, LoraSlots, choose_slots
from svc.errors import RefusedError
from svc.model_folder.chat_template import TemplateKwargs
from svc.registry.adapter import AdapterBase, AdapterFacts, read_adapter
from svc.registry.registry import Registry
from svc.settings import AdapterSettings
from svc.version import Format, Target


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One engine's model.

    Attributes:
        folder: the version's model folder; that of its base, where it is served as an adapter.
        base: of adapters; None where the version is in the folder itself.
        lora: room for adapters; None without a base.
    """

    folder: Path
    base: AdapterBase | None = None
    lora: LoraSlots | None = None

    @property
    def template_kwargs(self) -> TemplateKwargs | None:
        """What its chat template is given; None: what the folder says."""
        return dict(self.base.template_kwargs) if self.base else None


def served_model(registry: Registry, target: Target, settings: AdapterSettings) -> ServedModel:
    """What an engine is started with; reads the disk.

    Raises:
        NotFoundError: no such version or format, or the base of its adapter is gone.
        RefusedError: vLLM cannot apply its adapter beside the base, or its rank is too large.
        IntegrityError: the adapter's config is damaged.
    """
    if target.format is not Format.ADAPTER:
        return ServedModel(registry.artifact(target.version, target.format))
    adapter = read_adapter(registry, target.version)
    most = LARGEST_RANK if settings.max_rank is None else settings.max_rank
    if adapter.rank > most:
        raise _too_large(adapter, most)
    slots = choose_slots(
        max_loaded=settings.max_loaded,
        max_rank=settings.max_rank,
        rank=adapter.rank,
        targets=adapter.targets,
        size=adapter.bytes,
    )
    return ServedModel(adapter.base.folder, adapter.base, slots)


def require_fit(model: ServedModel, adapter: AdapterFacts) -> None:
    """Raises where an engine cannot apply an adapter.

    Args:
        model: what the engine was started with.

    Raises:
        RefusedError: says why, without paths.
    """
    slots = model.lora
    if slots is None or adapter.base != model.base:
        raise RefusedError(
            f"{adapter.version} has another base model than what is served, or another chat template",
            expected="an adapter of the same base, which is given the same",
            todo=f"ask the operator for it: svc promote {adapter.version}",
        )
    if adapter.rank > slots.max_rank:
        raise _too_large(adapter, slots.max_rank)
    if others := sorted(adapter.targets.difference(slots.targets)):
        raise RefusedError(
            f"{adapter.version} changes the layers {', '.join(others)}, for which the engine has no room",
            expected=f"changes of {', '.join(slots.targets)}",
            todo=f"ask the operator for it: svc promote {adapter.version}",
        )


def _too_large(adapter: AdapterFacts, most: int) -> RefusedError:
    return RefusedError(
        f"the adapter of {adapter.version} has rank {adapter.rank}",
        expected=f"at most {most}: adapters.max_rank, or what fits the version that an engine started with",
        todo="raise adapters.max_rank and start the engine again, or serve the version with --format merged",
    )
