"""Resolves the base model that a recipe names, which may be a registered version."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from svc.model_folder.weight_files import TOKENIZER_FILES
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.terminal import console
from svc.version import Format, VersionId
from trainer.base_model.checks import check_chat_template, has_chat_template
from trainer.base_model.more_tokens import folder_with_tokens, revision_with_tokens
from trainer.base_model.other_rope import folder_with_rope, revision_with_rope
from trainer.base_model.other_template import folder_with_template, revision_with_template
from trainer.base_model.resolve import Base, resolve_base, resolve_config
from trainer.data.template_choice import template_text
from trainer.recipe.named_template import NamedTemplate
from trainer.recipe.rope import RopeScaling

_OWN_POSITIONS = RopeScaling()


def find_base(
    name: str,
    settings: Settings,
    template: NamedTemplate | Path | None = None,
    scaling: RopeScaling = _OWN_POSITIONS,
    tokens: Sequence[str] = (),
) -> Base:
    """Return the base model that a recipe names. It is either a version's merged weights or a base found by
    `resolve_base`.

    Args:
        template: chat template to use in place of the base's own, or None to keep the base's own.
        scaling: scaling of the rotary position embeddings; a type of None keeps the base's own.
        tokens: new tokens to add to the base.

    Raises:
        BaseModelError: the base does not exist or has no chat template, or the given template, scaling or tokens cannot
            be used.
        NotFoundError: the version does not exist.
    """
    base = _find(name, settings)
    if template is not None:
        if has_chat_template(base.folder):
            console.print(
                f"  the chat template {template} replaces the base's own template", markup=False, soft_wrap=True
            )
        text = template_text(template, base.folder)
        folder = folder_with_template(base.folder, text, settings.base_cache)
        base = replace(base, folder=folder, revision=revision_with_template(base.revision, text))
    check_chat_template(base.folder)
    if scaling.type is not None:
        folder = folder_with_rope(base.folder, scaling, settings.base_cache)
        base = replace(base, folder=folder, revision=revision_with_rope(base.revision, scaling))
    if tokens:
        folder = folder_with_tokens(base.folder, tokens, settings.base_cache)
        base = replace(base, folder=folder, revision=revision_with_tokens(base.revision, tokens))
    return base


def _find(name: str, settings: Settings) -> Base:
    if "@" not in name or Path(name).exists():
        return resolve_base(name, settings.base_cache)
    version = VersionId.parse(name)
    registry = Registry.of(settings)
    manifest = registry.manifest(version)
    registry.verify(version, Format.MERGED)
    folder = registry.artifact(version, Format.MERGED)
    return Base(folder, name, manifest.base.licence, merged_revision(manifest))


def find_config(
    name: str,
    settings: Settings,
    template: NamedTemplate | Path | None = None,
    scaling: RopeScaling = _OWN_POSITIONS,
    tokens: Sequence[str] = (),
) -> Path:
    """Return a folder that contains the base model's config.json, without fetching or reading any weights.

    Args:
        template: chat template to use in place of the base's own, if the folder has a tokenizer, or None to
            keep the base's own.
        scaling: scaling of the rotary position embeddings; a type of None keeps the base's own.
        tokens: new tokens to add to the base.

    Raises:
        BaseModelError: the base does not exist, or the given template, scaling or tokens cannot be used.
        NotFoundError: the version does not exist.
    """
    if "@" in name and not Path(name).exists():
        folder = Registry.of(settings).artifact(VersionId.parse(name), Format.MERGED)
    else:
        folder = resolve_config(name, settings.base_cache)
    tokenizes = any((folder / file).is_file() for file in TOKENIZER_FILES)
    if template is not None and tokenizes:
        folder = folder_with_template(folder, template_text(template, folder), settings.base_cache)
    if scaling.type is not None:
        folder = folder_with_rope(folder, scaling, settings.base_cache)
    return folder_with_tokens(folder, tokens, settings.base_cache) if tokens and tokenizes else folder


def merged_revision(manifest: Manifest) -> str:
    """Return the digest (`sha256:<hex>`) of a version's merged model. The digest identifies the merged model when it is
    the base of another version.
    """
    return format_revision(manifest, Format.MERGED)


def format_revision(manifest: Manifest, format: Format) -> str:
    """Return the digest (`sha256:<hex>`) of a version's files in the given format."""
    hashes = " ".join(file.sha256 for file in manifest.formats[format].files)
    return f"sha256:{hashlib.sha256(hashes.encode()).hexdigest()}"
