"""Writes safetensors files tensor by tensor, in any order, with the same file names as `save_pretrained`.

The writer in safetensors needs all tensors of a file in memory. The writer in this module does not: a file begins with
the offsets of its tensors, which can be computed from the shapes. Imports torch.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from svc.model_folder.weight_files import WEIGHTS_INDEX

_MAX_FILE_SIZE = "5GB"
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def open_tensor_files(
    folder: Path, shapes: Mapping[str, torch.Tensor], parameters: int
) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """Open the model's files and yield a function that writes one tensor. If there is more than one file, write
    an index too.

    Args:
        folder: output folder, created if missing.
        shapes: tensors without data, with the shapes and data types to write, keyed by name.
        parameters: number of the model's parameters, for the index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(
        dict(shapes), filename_pattern="model{suffix}.safetensors", max_shard_size=_MAX_FILE_SIZE
    )
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for name, tensors in split.filename_to_tensors.items():
            file = stack.enter_context((folder / name).open("wb"))
            places |= _begin(file, {tensor: shapes[tensor] for tensor in tensors})

        def write(name: str, tensor: torch.Tensor) -> None:
            file, start = places[name]
            file.seek(start)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

        yield write
    if split.is_sharded:
        metadata = {"total_parameters": parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _begin(file: BinaryIO, shapes: Mapping[str, torch.Tensor]) -> dict[str, tuple[BinaryIO, int]]:
    """Write the header and return each tensor's file and offset. Tensors with the widest data type come
    first, as in files written by safetensors itself.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, tensor in sorted(shapes.items(), key=lambda item: (-item[1].itemsize, item[0])):
        starts[name], end = end, end + tensor.nbytes
        offsets = [starts[name], end]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little") + content)
    return {name: (file, 8 + len(content) + start) for name, start in starts.items()}
