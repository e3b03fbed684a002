"""What `svc compare` is given: a version, a base model, or an endpoint elsewhere."""

from dataclasses import dataclass, replace
from pathlib import Path

from svc.errors import NotFoundError
from svc.evaluation.endpoint import Endpoint
from svc.model_folder.chat_template import TemplateKwargs, choose_template_kwargs, read_template_kwargs
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.settings import Settings
from svc.version import Format
from trainer.base_model.pypi_wheel import KNOWN
from trainer.base_model.resolve import resolve_base
from trainer.pipeline.find_base import format_revision


@dataclass(frozen=True, slots=True)
class LocalModel:
    """One that an engine here can hold.

    Attributes:
        name: for people.
        revision: names its content.
        template_kwargs: what its chat template is given.
        manifest: of a version; None of a base.
        format: of a version.
    """

    name: str
    folder: Path
    revision: str
    template_kwargs: TemplateKwargs
    manifest: Manifest | None = None
    format: Format | None = None

    def __str__(self) -> str:
        return self.name


Model = LocalModel | Endpoint


def find_model(text: str, registry: Registry, settings: Settings, *, format: Format | None, key: str | None) -> Model:
    """What a word on the command line means.

    Args:
        text: an endpoint as https://HOST/v1#MODEL; `NAME`, `NAME@N` or `NAME@alias`; or a base as in a recipe.
        format: of a version; None: GPTQ where it has that, as it is served.
        key: for an endpoint.

    Raises:
        SvcError: there is no such thing, or it is damaged.
    """
    if "://" in text:
        return Endpoint.parse(text, key)
    if not text.startswith((".", "/", "~")) and (text in registry.names() or "@" in text):
        return _version(registry.manifest(registry.resolve(text)), registry, format)
    is_base = text in KNOWN or "/" in text or text.endswith(".gguf") or text.startswith((".", "~"))
    if not is_base:
        raise NotFoundError(
            f"{text!r} is no version and no base model",
            expected=f"a version of {', '.join(registry.names()) or 'none yet'}; a base: {', '.join(KNOWN)}, ./FOLDER, "
            "ORG/NAME; or an endpoint: https://HOST/v1#MODEL",
            todo="see `svc models`",
        )
    base = resolve_base(text, settings.base_cache)
    return LocalModel(text, base.folder, base.revision, choose_template_kwargs(base.folder, None))


def asked_alike(base: Model, other: Model) -> Model:
    """A base, asked as the version that was made of it is; any other model as it is."""
    version = other.manifest if isinstance(other, LocalModel) else None
    if isinstance(base, Endpoint) or base.manifest or version is None or version.base.revision != base.revision:
        return base
    kwargs = choose_template_kwargs(base.folder, version.recipe.get("chat_template_kwargs"))
    return replace(base, template_kwargs=kwargs)


def _version(manifest: Manifest, registry: Registry, format: Format | None) -> LocalModel:
    whole = [one for one in (Format.GPTQ, Format.MERGED) if one in manifest.formats]
    chosen = format or next(iter(whole), None)
    if chosen not in whole:
        raise NotFoundError(
            f"{manifest.id} has no format {chosen or 'that is a whole model'}",
            expected=f"one of {', '.join(whole)}" if whole else "merged or gptq: an adapter alone is not compared",
            todo="train it with formats: [merged]",
        )
    registry.verify(manifest.id, chosen)
    folder = registry.artifact(manifest.id, chosen)
    name = f"{manifest.id} ({chosen})"
    return LocalModel(name, folder, format_revision(manifest, chosen), read_template_kwargs(folder), manifest, chosen)
