"""A model in GGUF, as llama.cpp has it, converted to what training reads."""

from pathlib import Path

from svc.errors import BaseModelError
from svc.terminal import waiting
from trainer.base_model.checks import check_folder


def convert_gguf(path: Path, folder: Path, licence: str | None) -> None:
    """Writes a GGUF model as bf16 safetensors; the licence goes into a model card, where the hub has it too.

    Raises:
        BaseModelError: transformers cannot read it, or it has no chat template.
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
                expected="a GGUF file of an architecture that transformers can read",
                todo="use the model's safetensors from the hub instead",
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n", "utf-8")
    check_folder(folder)


def gguf_licence(path: Path) -> str | None:
    """What the file says of its licence."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return str(field.contents()) if field else None
