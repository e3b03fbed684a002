"""Reads the config of a model folder with transformers, which converts old keys and fills in defaults."""

from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(folder: Path) -> "PreTrainedConfig":
    """Load the config of a model folder without running any code from the folder.

    Raises:
        BaseModelError: transformers cannot read the config, for example because a value is invalid or the
            architecture is unknown.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise BaseModelError(
            f"transformers cannot read {folder / 'config.json'}: {error}",
            expected="the config of an architecture that transformers supports without custom code",
            todo="download the model's config.json again, or choose another base",
        ) from error
    return config


def read_width(folder: Path) -> int:
    """Return the hidden width of the model in a folder.

    Raises:
        BaseModelError: transformers cannot read its config.
    """
    return int(load_config(folder).get_text_config().hidden_size)
