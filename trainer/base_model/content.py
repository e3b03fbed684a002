"""What is in a base model's files: their hash, which names the content, and the licence."""

import hashlib
import shutil
from pathlib import Path

from svc.chat_template import pin_date, read_chat_template
from svc.terminal import waiting

TEMPLATE_FILE = "chat_template.jinja"
SHIPPED_FILES = (
    "added_tokens.json",
    TEMPLATE_FILE,
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What a model has beside its weights and config, and what is made of it takes over byte for byte; of a chat template
that writes today's date, all but that."""
_HASHED = (".safetensors", ".json", ".jinja", ".model", ".txt")


def read_licence(folder: Path) -> str | None:
    """What the model card's header says."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import metadata_load

    licence = (metadata_load(card) or {}).get("license")
    return str(licence) if licence else None


def model_files(folder: Path) -> list[Path]:
    """The files that decide what a model is."""
    return sorted(file for file in folder.iterdir() if file.suffix in _HASHED and file.is_file())


def copy_shipped_files(model: Path, out: Path) -> None:
    """Puts a model's tokenizer, chat template and generation config beside other weights, and removes any others."""
    for name in SHIPPED_FILES:
        (out / name).unlink(missing_ok=True)
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)
    if pinned := pinned_template(model):
        (out / TEMPLATE_FILE).write_text(pinned, "utf-8")


def pinned_template(model: Path) -> str | None:
    """What is served in place of a model's chat template: one that writes today's date; None where that is not so."""
    template = read_chat_template(model) or ""
    pinned = pin_date(template)
    return pinned if pinned != template else None


def hash_files(files: list[Path]) -> str:
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
