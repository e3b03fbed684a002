"""Defines families of base models as their publishers write them on the hub.

`fixtures/NAME/` contains a family's config.json, generation_config.json, tokenizer_config.json and
special_tokens_map.json in its publisher's spelling, with the published vocabulary size and token ids.
Only the layer sizes, the number of layers and the attention windows are smaller. Widths are multiples of
32 with heads of 32, as the engine's 4-bit kernel for CPUs requires.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path

_FIXTURES = Path(__file__).parent / "fixtures"
_TEMPLATE = "chat_template.jinja"


class Vocabulary(Enum):
    """The local tokenizer from which a family's tokenizer is made. See tests.hub_models.tokenizer."""

    SMOLLM2 = "SmolLM2's, with the family's special tokens in place of its own"
    MISTRAL_1 = "mistral_common's first, which has Llama 2's pieces"
    MISTRAL_3 = "mistral_common's third, with the family's special tokens in place of its own"


@dataclass(frozen=True)
class Family:
    """A family of base models.

    Attributes:
        licence: licence as written in the model card's header.
        trl_template: name of TRL's copy of the chat template, or None if the fixture contains the template.
        npm_tokenizer: name of the real tokenizer that `make test-matrix` fetches (fetch_tokenizers.sh).
        sentencepiece_only: whether the folder has a tokenizer.model and no tokenizer.json.
        is_mixture: whether each token passes through only some of the experts.
        epochs: number of epochs over a few examples until the loss falls by more than a nat.
    """

    name: str
    vocabulary: Vocabulary
    licence: str
    trl_template: str | None = None
    npm_tokenizer: str | None = None
    sentencepiece_only: bool = False
    is_mixture: bool = False
    epochs: int = 1

    @cached_property
    def texts(self) -> dict[str, str]:
        """Return the contents of the fixture's files, keyed by name, without the chat template."""
        folder = _FIXTURES / self.name
        return {path.name: path.read_bytes().decode("utf-8") for path in folder.iterdir() if path.name != _TEMPLATE}

    @cached_property
    def template(self) -> str:
        """Return the family's chat template."""
        if self.trl_template is None:
            return (_FIXTURES / self.name / _TEMPLATE).read_text("utf-8")
        from importlib.resources import files

        return files("trl.chat_templates").joinpath(f"{self.trl_template}.jinja").read_text("utf-8")


_SMOLLM2, _MISTRAL_1, _MISTRAL_3 = Vocabulary
_LLAMA_3_1, _QWEN3 = "tokenizer-llama3_1", "tokenizer-qwen3"

FAMILIES = {
    family.name: family
    for family in (
        Family("llama_2", _MISTRAL_1, "llama2", npm_tokenizer="tokenizer-llama2"),
        Family("llama_3_1", _SMOLLM2, "llama3.1", "llama3_1", _LLAMA_3_1),
        Family("llama_3_2", _SMOLLM2, "llama3.2", "llama3_2", _LLAMA_3_1),
        Family("smollm2", _SMOLLM2, "apache-2.0"),
        Family("smollm3", _SMOLLM2, "apache-2.0"),
        Family("qwen2_5", _SMOLLM2, "apache-2.0", "qwen2_5"),
        Family("qwen3", _SMOLLM2, "apache-2.0", "qwen3", _QWEN3),
        Family("qwen3_moe", _SMOLLM2, "apache-2.0", "qwen3", _QWEN3, is_mixture=True),
        Family("mistral", _MISTRAL_3, "apache-2.0"),
        Family("mistral_3_1", _MISTRAL_3, "apache-2.0"),
        Family("mixtral", _MISTRAL_1, "apache-2.0", sentencepiece_only=True, is_mixture=True),
        Family("gemma_2", _MISTRAL_3, "gemma", "gemma"),
        Family("gemma_3", _MISTRAL_3, "gemma", "gemma3", "tokenizer-gemma3"),
        Family("gemma_3_4b", _MISTRAL_3, "gemma", "gemma3", "tokenizer-gemma3"),
        Family("phi_2", _SMOLLM2, "mit"),  # the publisher has no chat template; a fine-tuner must add one
        Family("phi_3", _MISTRAL_1, "mit", "phi3"),
        Family("phi_3_5", _MISTRAL_1, "mit", "phi3_5"),
        Family("phi_4", _SMOLLM2, "mit"),
        Family("olmo_2", _SMOLLM2, "apache-2.0"),
        # Granite divides its logits, by 16 where the width is 4,096 and by 4 here: random weights learn slowly.
        Family("granite", _SMOLLM2, "apache-2.0", epochs=8),
        Family("granite_moe", _SMOLLM2, "apache-2.0", is_mixture=True, epochs=8),
    )
}
DISTINCT = ("llama_2", "smollm3", "qwen3_moe", "mistral_3_1", "mixtral", "gemma_2", "gemma_3_4b", "phi_3", "granite")
"""Families that differ in their layers, their config or the files of their tokenizer."""
