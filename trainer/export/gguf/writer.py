"""Writes a merged model to a single GGUF file with the `gguf` package, tensor by tensor."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.errors import TrainingError
from svc.files.disk import write_whole
from svc.model_folder.chat_template import TemplateKwargs, TemplateValue, read_template_kwargs
from svc.model_folder.weight_files import weight_files
from svc.terminal import waiting
from trainer.data.chat_template import load_tokenizer
from trainer.export.gguf.architecture import Architecture, read_architecture
from trainer.export.gguf.modelfile import make_modelfile
from trainer.export.gguf.sentencepiece import SentencePiece
from trainer.export.gguf.tokens import PreTokenizer, choose_pre_tokenizer, read_tokenizer
from trainer.library_output import library_output_to_log

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedTokenizerBase

    from svc.dataset.schema.example import ChatExample

MODELFILE = "Modelfile"
_ROPE_FACTORS = "rope_freqs.weight"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class GgufType(StrEnum):
    """Data type of the matrices in a GGUF file."""

    Q8_0 = "q8_0"
    F16 = "f16"


MAX_CHANGE = {GgufType.Q8_0: 0.03, GgufType.F16: 0.001}
"""Maximum relative change of a matrix: the norm of the change divided by the norm of the matrix. Measured for SmolLM2's
worst matrix in Q8_0: 0.0065; in F16: below 0.00001."""


@dataclass(frozen=True, slots=True)
class GgufSummary:
    """Summary of an export to GGUF.

    Attributes:
        file: the GGUF file.
        bytes: size of the file.
        pre: name of the pre-tokenizer in llama.cpp.
        compared: number of held-out examples whose token ids were compared.
        worst_change: largest ratio of the norm of a matrix's change to the norm of the matrix.
        worst_tensor: the matrix with the largest change.
    """

    file: Path
    bytes: int
    pre: str
    compared: int
    worst_change: float
    worst_tensor: str


def export_gguf(
    model: Path,
    out: Path,
    name: str,
    examples: "Sequence[ChatExample]",
    *,
    type: GgufType = GgufType.Q8_0,
    modelfile: bool = True,
) -> GgufSummary:
    """Write a merged model to `out/NAME-TYPE.gguf`, and a Modelfile for Ollama next to it.

    Nothing is written if the model is rejected. After the file has been written, it is read again and compared with the
    model.

    Args:
        model: folder of the merged model, with the base's tokenizer and template.
        out: output folder, created if missing.
        name: name of the model.
        examples: held-out examples, for which llama.cpp must produce the same token ids.
        modelfile: whether to write a Modelfile.

    Raises:
        TrainingError: llama.cpp or Ollama would give results that differ from the engine's.
    """
    kwargs, file = read_template_kwargs(model), out / f"{name}-{type}.gguf"
    architecture, tokenizer, pre = check_gguf(model, kwargs, examples, modelfile=modelfile)
    made = make_modelfile(tokenizer, kwargs, file.name) if modelfile else None
    out.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    try:
        with waiting(f"Writing {file.name}"), library_output_to_log():
            _write(model, unfinished, name, architecture, tokenizer, kwargs, pre, type)
        change, tensor = compare_gguf(unfinished, model, file.name, MAX_CHANGE[type])
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    if made is not None:
        write_whole(out / MODELFILE, made.encode("utf-8"))
    return GgufSummary(file, file.stat().st_size, pre.name, len(examples), change, tensor)


def check_gguf(
    model: Path, kwargs: TemplateKwargs, examples: "Sequence[ChatExample]", *, modelfile: bool = True
) -> "tuple[Architecture, PreTrainedTokenizerBase, PreTokenizer | SentencePiece]":
    """Check that a model can be written to GGUF, and return how it must be written. No weights are read.

    Args:
        model: folder of the model, or of the base before training.
        kwargs: arguments of the chat template.
        examples: held-out examples, for which llama.cpp must produce the same token ids.
        modelfile: whether Ollama must also be able to render the chat template.

    Raises:
        TrainingError: llama.cpp or Ollama would give results that differ from the engine's.
    """
    with waiting("Comparing token ids with llama.cpp's"), library_output_to_log():
        architecture, tokenizer = read_architecture(model), load_tokenizer(model)
        pre = choose_pre_tokenizer(tokenizer, render_examples(tokenizer, kwargs, examples))
        if modelfile:
            make_modelfile(tokenizer, kwargs, MODELFILE)
    return architecture, tokenizer, pre


def render_examples(
    tokenizer: "PreTrainedTokenizerBase", kwargs: TemplateKwargs, examples: "Sequence[ChatExample]"
) -> list[str]:
    """Return each example as the text of its whole conversation."""
    conversations = ([message.as_dict() for message in example.messages] for example in examples)
    return [str(tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)) for turns in conversations]


def _write(
    model: Path,
    file: Path,
    name: str,
    architecture: Architecture,
    tokenizer: "PreTrainedTokenizerBase",
    kwargs: TemplateKwargs,
    pre: PreTokenizer | SentencePiece,
    type: GgufType,
) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, architecture.name)])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    architecture.write_keys(writer)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if type is GgufType.Q8_0 else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_vocabulary(writer, architecture, tokenizer, kwargs, pre)
    with ExitStack() as stack:
        tensors = list(_tensors(model, architecture, stack))
        for tensor in tensors:
            numbers = tensor.number_type(type)
            block, block_bytes = gguf.GGML_QUANT_SIZES[numbers]
            size = math.prod(tensor.shape) // block * block_bytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(gguf.quantize(tensor.read(), tensor.number_type(type)))
        writer.close()


def _write_vocabulary(
    writer: "GGUFWriter",
    architecture: Architecture,
    tokenizer: "PreTrainedTokenizerBase",
    kwargs: TemplateKwargs,
    pre: PreTokenizer | SentencePiece,
) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Embedding rows without a token get placeholder tokens.
    """
    from gguf import TokenType

    content = read_tokenizer(tokenizer)
    size = architecture.config.vocab_size
    tokens, types = [f"[PAD{number}]" for number in range(size)], [TokenType.UNUSED] * size
    for text, number in content["model"]["vocab"].items():
        tokens[number], types[number] = text, TokenType.NORMAL
    for added in content.get("added_tokens", []):
        if added["id"] < size:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], kind
    if isinstance(pre, SentencePiece):
        types = [TokenType.BYTE if _BYTE.fullmatch(text) else kind for text, kind in zip(tokens, types, strict=True)]
        if (unknown := content["model"].get("unk_token")) in tokens:
            types[tokens.index(unknown)] = TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([pre.score(text) for text in tokens])
        writer.add_add_space_prefix(pre.prefix)
    else:
        merges = content["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre.name)
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for kind, token in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_add_bos_token(tokenizer("")["input_ids"] == [tokenizer.bos_token_id])
    writer.add_chat_template(_with_arguments(str(tokenizer.chat_template), kwargs))


def _with_arguments(template: str, kwargs: TemplateKwargs) -> str:
    """Return a chat template with its arguments built in, because llama.cpp does not pass any."""
    return "".join(f"{{%- set {name} = {_literal(value)} -%}}" for name, value in sorted(kwargs.items())) + template


def _literal(value: TemplateValue) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to write.

    Attributes:
        name: its name in GGUF.
        load: function that returns its values in float32.
    """

    name: str
    shape: tuple[int, ...]
    load: "Callable[[], np.ndarray[Any, Any]]"

    def number_type(self, type: GgufType) -> "GGMLQuantizationType":
        """Return the type in which the tensor is written. Vectors keep 32 bits, which llama.cpp requires."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if len(self.shape) == 1:
            return GGMLQuantizationType.F32
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
        fits = type is GgufType.Q8_0 and self.shape[-1] % block == 0
        return GGMLQuantizationType.Q8_0 if fits else GGMLQuantizationType.F16

    def read(self) -> "np.ndarray[Any, Any]":
        """Return the tensor's values in float32."""
        return self.load()


def _tensors(model: Path, architecture: Architecture, stack: ExitStack) -> Iterator[_Tensor]:
    """Yield the tensors of a model, each with its GGUF name.

    Raises:
        TrainingError: GGUF has no name for a tensor.
    """
    import gguf
    import numpy as np
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.name), architecture.config.num_hidden_layers)
    if (factors := architecture.rope_factors()) is not None:
        yield _Tensor(_ROPE_FACTORS, (len(factors),), lambda: np.array(factors, np.float32))
    for path in weight_files(model):
        file = stack.enter_context(safe_open(path, framework="pt"))
        for stored in file.keys():  # noqa: SIM118 - no mapping
            name = names.get_name(stored, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise TrainingError(
                    f"GGUF has no name for tensor {stored!r}", expected="a model in which every tensor has a GGUF name"
                )
            shape = tuple(file.get_slice(stored).get_shape())
            yield _Tensor(name, shape, partial(_load, file, stored, architecture))


def _load(file: Any, stored: str, architecture: Architecture) -> "np.ndarray[Any, Any]":
    content: np.ndarray[Any, Any] = file.get_tensor(stored).float().numpy()
    heads = architecture.heads_to_permute(stored)
    return content + architecture.added_to(stored) if heads is None else permute(content, heads)


def permute(rows: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Return the rows of a query or key matrix in llama.cpp's order.

    For rotary embeddings, transformers pairs each element of a head with the element half a head away, whereas
    llama.cpp pairs adjacent elements.
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def compare_gguf(file: Path, model: Path, name: str, most: float) -> tuple[float, str]:
    """Compare each matrix of a GGUF file with the same matrix of the model.

    Args:
        name: name of the file in messages.
        most: maximum norm of a matrix's change, relative to the norm of the matrix.

    Returns:
        The largest ratio, and the name of the matrix with this ratio.

    Raises:
        TrainingError: a matrix changed by more than `most`, or contains NaN.
    """
    import gguf
    import numpy as np

    changes = []
    with waiting(f"Comparing {name} with the merged weights"), ExitStack() as stack:
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        for tensor in _tensors(model, read_architecture(model), stack):
            before, found = tensor.read(), written.pop(tensor.name)
            after = gguf.dequantize(found.data, found.tensor_type).reshape(before.shape)
            norm = float(np.linalg.norm(before)) or 1.0
            change = float(np.linalg.norm(after - before)) / norm
            changes.append((math.inf if math.isnan(change) else change, tensor.name))
    largest, changed = max(changes)
    if largest > most:
        raise TrainingError(
            f"tensor {changed} changed by {largest:.3f} of its norm when written to {name}", expected=f"at most {most}"
        )
    return largest, changed
