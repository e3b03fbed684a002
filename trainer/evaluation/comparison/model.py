"""The models that `svc compare` accepts: a version, a base model, or a remote endpoint."""

from dataclasses import dataclass, replace
from pathlib import Path

from svc.errors import BaseModelError, NotFoundError
from svc.evaluation.endpoint import Endpoint
from svc.model_folder.chat_template import (
    TemplateKwargs,
    choose_template_kwargs,
    read_chat_template,
    read_template_kwargs,
)
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.version import SERVED_FORMATS, Format
from trainer.base_model.checks import has_chat_template
from trainer.base_model.find_base import format_revision
from trainer.base_model.other_template import folder_with_template, revision_with_template
from trainer.base_model.pypi_wheel import KNOWN
from trainer.base_model.resolve import resolve_base


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that an engine on this machine can load.

    Attributes:
        name: display name.
        revision: digest of the model's content.
        template_kwargs: arguments for the model's chat template.
        manifest: manifest of a version, or None for a base.
        format: format of a version, or None for a base.
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
    """Find the model that a command-line argument refers to.

    Args:
        text: an endpoint (https://HOST/v1#MODEL); `NAME`, `NAME@N` or `NAME@alias`; or a base as in a
            recipe.
        format: format of a version; if None, the format that a server prefers.
        key: API key for an endpoint.

    Raises:
        SvcError: the model does not exist, or is damaged.
    """
    if "://" in text:
        return Endpoint.parse(text, key)
    if not text.startswith((".", "/", "~")) and (text in registry.names() or "@" in text):
        return _version(registry.manifest(registry.resolve(text)), registry, format)
    is_base = text in KNOWN or "/" in text or text.endswith(".gguf") or text.startswith((".", "~"))
    if not is_base:
        raise NotFoundError(
            f"{text!r} is not a version, a base model or an endpoint",
            expected=f"a version of {', '.join(registry.names()) or 'a model (none is registered)'}; a base: "
            f"{', '.join(KNOWN)}, ./FOLDER, ORG/NAME; or an endpoint: https://HOST/v1#MODEL",
            todo="see `svc models`",
        )
    base = resolve_base(text, settings.base_cache)
    return LocalModel(text, base.folder, base.revision, choose_template_kwargs(base.folder, None))


def asked_alike(base: Model, other: Model, cache: Path) -> Model:
    """Return `base` with the chat template and template arguments of `other`, if `other` is a version trained
    from it.

    Otherwise, `base` is returned unchanged.

    Args:
        cache: folder for converted base models.

    Raises:
        BaseModelError: `base` has no chat template.
    """
    if isinstance(base, Endpoint) or base.manifest:
        return base
    if isinstance(other, LocalModel) and (version := other.manifest):
        template = read_chat_template(other.folder) if version.recipe.get("chat_template") else None
        revision = revision_with_template(base.revision, template) if template else base.revision
        if version.base.revision == revision:
            folder = folder_with_template(base.folder, template, cache) if template else base.folder
            kwargs = choose_template_kwargs(folder, version.recipe.get("chat_template_kwargs"))
            return replace(base, folder=folder, revision=revision, template_kwargs=kwargs)
    if not has_chat_template(base.folder):
        raise BaseModelError(
            f"{base} has no chat template",
            expected="an instruction-tuned model, or a base that is compared with a version trained from it",
            todo="train a version of this base with chat_template in the recipe, and compare the two",
        )
    return base


def _version(manifest: Manifest, registry: Registry, format: Format | None) -> LocalModel:
    comparable = [format for format in SERVED_FORMATS if format in manifest.formats]
    chosen = format or next(iter(comparable), None)
    if chosen not in comparable:
        expected = (
            f"one of {', '.join(comparable)}" if comparable else "a complete model, because adapters cannot be compared"
        )
        raise NotFoundError(
            f"{manifest.id} has no format {chosen or 'that contains a complete model'}",
            expected=expected,
            todo="train the version with `formats: [merged]`",
        )
    registry.verify(manifest.id, chosen)
    folder = registry.artifact(manifest.id, chosen)
    name = f"{manifest.id} ({chosen})"
    return LocalModel(name, folder, format_revision(manifest, chosen), read_template_kwargs(folder), manifest, chosen)
