"""Downloads a model from the Hugging Face Hub: its text files and safetensors, never pickle files or code."""

from pathlib import Path
from typing import Any

from svc.errors import BaseModelError
from svc.terminal import console, waiting
from trainer.base_model.pypi_wheel import KNOWN

_CONFIG_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "README.md"]
_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "README.md"]
_HUB_FILES = ["model.safetensors", "model-*-of-*.safetensors", *_CONFIG_FILES]
"""File patterns to download. The patterns exclude `consolidated.safetensors`, which duplicates all weights in Mistral's
repositories."""


def fetch_snapshot(base: str, cache: Path) -> Path:
    """Download the files of a model that the cache lacks, and return the model's folder, named after the commit.

    Raises:
        BaseModelError: the Hub cannot be reached, or rejects the request.
    """
    return _fetch(base, cache / "hub", _HUB_FILES)


def fetch_config(base: str, cache: Path) -> Path:
    """Return a cache folder with a model's config and tokenizer, downloading them if they are missing. Weights
    are not downloaded.

    Raises:
        BaseModelError: the Hub cannot be reached, or rejects the request.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, cache_dir=cache / "hub", local_files_only=True))
    except LocalEntryNotFoundError:  # a separate folder: in the weights' folder it would seem to be the complete model
        return _fetch(base, cache / "configs", _CONFIG_FILES)


def fetch_adapter(adapter: str, cache: Path) -> Path:
    """Download an adapter's files, unless they are cached, and return the adapter's folder, named after the commit.

    Raises:
        BaseModelError: the Hub cannot be reached, or rejects the request.
    """
    return _fetch(adapter, cache / "adapters", _ADAPTER_FILES)


def _fetch(base: str, folder: Path, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Progress bar for a download, which may take an hour. Shown only on a terminal."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named | {"disable": not console.is_terminal})  # type: ignore[no-untyped-call]

    try:
        with waiting(f"Fetching {base} from the Hugging Face hub"):
            snapshot = snapshot_download(
                base, cache_dir=folder, allow_patterns=patterns, ignore_patterns=["*/*"], tqdm_class=Bar
            )
    except LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"{base} is not in the local cache, and the Hugging Face hub cannot be reached",
            expected="a network connection, or a local copy of the model",
            todo="check the network, or copy the model to this machine and set `base` to its folder (for "
            f"`svc estimate` its config.json is enough), or use {', '.join(KNOWN)}",
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise BaseModelError(
            f"the Hugging Face hub rejected {base}: {str(error).strip().splitlines()[0]}",
            expected="the id of a public model, or of a model that HF_TOKEN can access",
            todo="check the id; for a gated model, accept its terms on the hub and set HF_TOKEN",
        ) from error
    return Path(snapshot)
