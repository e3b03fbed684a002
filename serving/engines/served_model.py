"""Determines which model an engine must be started with to serve a target, and which adapters the engine can apply."""

from dataclasses import dataclass
from pathlib import Path

from svc.engine.vllm.lora import LARGEST_RANK, LoraSlots, choose_slots
from svc.errors import RefusedError
from svc.model_folder.chat_template import TemplateKwargs
from svc.registry.adapter import AdapterBase, AdapterFacts, read_adapter
from svc.registry.registry import Registry
from svc.settings.engine import AdapterSettings
from svc.version import Format, Target


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model files that an engine is started with, and its capacity for adapters.

    Attributes:
        folder: the version's model folder or, if the version is served as an adapter, its base model's folder.
        base: the base model of the adapters, or None if the folder contains the version itself.
        lora: capacity for adapters, or None if `base` is None.
    """

    folder: Path
    base: AdapterBase | None = None
    lora: LoraSlots | None = None

    @property
    def template_kwargs(self) -> TemplateKwargs | None:
        """Chat template arguments, or None to use the arguments in the model folder."""
        return dict(self.base.template_kwargs) if self.base else None


def served_model(registry: Registry, target: Target, settings: AdapterSettings) -> ServedModel:
    """Return the model that an engine must be started with to serve a target. This reads from disk.

    Raises:
        NotFoundError: there is no such version or format, or its adapter's base is missing.
        RefusedError: vLLM cannot apply the version's adapter to the base, or the adapter's rank is too
            large.
        IntegrityError: the adapter's config is damaged.
    """
    if target.format is not Format.ADAPTER:
        return ServedModel(registry.artifact(target.version, target.format))
    adapter = read_adapter(registry, target.version)
    max_rank = LARGEST_RANK if settings.max_rank is None else settings.max_rank
    if adapter.rank > max_rank:
        raise _too_large(adapter, max_rank)
    slots = choose_slots(
        max_loaded=settings.max_loaded,
        max_rank=settings.max_rank,
        rank=adapter.rank,
        targets=adapter.targets,
        size=adapter.bytes,
    )
    return ServedModel(adapter.base.folder, adapter.base, slots)


def require_fit(model: ServedModel, adapter: AdapterFacts) -> None:
    """Check that an engine can apply an adapter to its model.

    Args:
        model: the model that the engine was started with.

    Raises:
        RefusedError: the engine cannot apply the adapter. The message gives the reason without any paths.
    """
    slots = model.lora
    if slots is None or adapter.base != model.base:
        raise RefusedError(
            f"{adapter.version} and the served version have different base models or chat templates",
            expected="an adapter with the same base model and chat template",
            todo=f"ask the operator to promote it: svc promote {adapter.version}",
        )
    if adapter.rank > slots.max_rank:
        raise _too_large(adapter, slots.max_rank)
    if others := sorted(adapter.targets.difference(slots.targets)):
        raise RefusedError(
            f"{adapter.version} adapts the layers {', '.join(others)}, which the engine was not configured to adapt "
            "when it started",
            expected=f"an adapter that changes only {', '.join(slots.targets)}",
            todo=f"ask the operator to promote it: svc promote {adapter.version}",
        )


def _too_large(adapter: AdapterFacts, max_rank: int) -> RefusedError:
    return RefusedError(
        f"the adapter of {adapter.version} has rank {adapter.rank}",
        expected=f"a rank of at most {max_rank}, the engine's limit",
        todo="increase `adapters.max_rank` and restart the engine, or serve the version with --format merged",
    )
