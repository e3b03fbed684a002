"""Resolves the base model that a recipe names, which may be a version of the registry."""

import hashlib
from pathlib import Path

from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.settings import Settings
from svc.version import Format, VersionId
from trainer.base_model.resolve import Base, resolve_base, resolve_config


def find_base(name: str, settings: Settings) -> Base:
    """Return the base model that a recipe names: a version's merged weights, or a base that `resolve_base` finds.

    Raises:
        BaseModelError: there is no such base.
        NotFoundError: there is no such version.
    """
    if "@" not in name or Path(name).exists():
        return resolve_base(name, settings.base_cache)
    version = VersionId.parse(name)
    registry = Registry.of(settings)
    manifest = registry.manifest(version)
    registry.verify(version, Format.MERGED)
    folder = registry.artifact(version, Format.MERGED)
    return Base(folder, name, manifest.base.licence, merged_revision(manifest))


def find_config(name: str, settings: Settings) -> Path:
    """Return a folder with the config.json of a base model; weights are neither fetched nor read.

    Raises:
        BaseModelError: there is no such base.
        NotFoundError: there is no such version.
    """
    if "@" in name and not Path(name).exists():
        return Registry.of(settings).artifact(VersionId.parse(name), Format.MERGED)
    return resolve_config(name, settings.base_cache)


def merged_revision(manifest: Manifest) -> str:
    """Return the digest (`sha256:<hex>`) of a merged model that another version uses as its base."""
    return format_revision(manifest, Format.MERGED)


def format_revision(manifest: Manifest, format: Format) -> str:
    """Return the digest (`sha256:<hex>`) of a version's files in a format."""
    hashes = " ".join(file.sha256 for file in manifest.formats[format].files)
    return f"sha256:{hashlib.sha256(hashes.encode()).hexdigest()}"
