"""The weight and tokenizer files that transformers and vLLM read from a model folder.

A folder from the Hub often contains other files too: the same weights in the publisher's own format
(`consolidated.safetensors`, `original/`), parameters (`params.json`) and images. These are ignored here.
"""

from pathlib import Path

from svc.errors import IntegrityError
from svc.files.json_file import read_json_object

WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Names of tokenizer files, any one of which is sufficient."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors weight files, sorted by name: the files listed in the index, or all weight files if there
    is no index.

    Files in the index are returned even if they do not exist.

    Raises:
        IntegrityError: the index cannot be read, or names a file outside the folder.
    """
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    weight_map = read_json_object(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise IntegrityError(
            f"{index} does not list the weight files",
            expected='{"weight_map": {"TENSOR": "FILE", ...}} with files in the same folder',
            todo="download the model again",
        )
    return [folder / name for name in sorted(names)]
