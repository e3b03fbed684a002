"""Makes tokenizers for the families from those available on this machine.

A family's special tokens replace the first tokens of another vocabulary, and its token ids are adapted.
A fixture's ids are the published ones, and only `TokenIds` changes them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from svc.settings.settings import Settings
from tests.hub_models.family import Family, Vocabulary

_SENTENCEPIECE = {
    Vocabulary.MISTRAL_1: "tokenizer.model.v1",
    Vocabulary.MISTRAL_3: "mistral_instruct_tokenizer_240323.model.v3",
}
_FETCHED = Path(__file__).parents[2] / ".venv" / "tokenizers"
_MAPPED_VALUES = re.compile(r'(?<=_token_id": )(?:\[[^]]*]|\d+)|"\d+"(?=: \{)')
_VOCABULARY_SIZE = re.compile(r'(?<="vocab_size": )\d+')


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids of a family's special tokens and its vocabulary size in the tokenizer that the family gets.

    Attributes:
        of_published: id in the tokenizer, keyed by published id; ids that are missing stay unchanged.
        vocabulary_size: size of the vocabulary, or None if it is the published size.
    """

    of_published: Mapping[int, int]
    vocabulary_size: int | None

    def rewrite(self, text: str) -> str:
        """Return a JSON text with these ids in place of the published ones and every other character unchanged."""
        if self.vocabulary_size is not None:
            text = _VOCABULARY_SIZE.sub(str(self.vocabulary_size), text)
        return _MAPPED_VALUES.sub(self._rewrite_numbers, text)

    def _rewrite_numbers(self, found: re.Match[str]) -> str:
        return re.sub(r"\d+", lambda number: str(self.of_published.get(int(number[0]), int(number[0]))), found[0])


PUBLISHED = TokenIds({}, None)


def special_tokens(family: Family) -> dict[int, str]:
    """Return the special tokens named in a family's tokenizer_config.json, keyed by published id."""
    tokens = json.loads(family.texts["tokenizer_config.json"]).get("added_tokens_decoder", {})
    return {int(number): token["content"] for number, token in tokens.items()}


def token_ids(family: Family) -> TokenIds:
    """Return how the published ids map to the tokenizer that `write_tokenizer` writes."""
    if family.vocabulary is Vocabulary.SMOLLM2:
        ids = {published: number for number, published in enumerate(special_tokens(family))}
        return TokenIds(ids, smollm2_vocabulary_size())
    return PUBLISHED if family.vocabulary is Vocabulary.MISTRAL_1 else TokenIds({}, 32768)


def fetched_tokenizer(family: Family) -> Path | None:
    """Return the folder with the family's real tokenizer, or None if it is not available here."""
    folder = _FETCHED / (family.npm_tokenizer or "none")
    return folder if (folder / "tokenizer.json").is_file() else None


def write_tokenizer(folder: Path, family: Family) -> None:
    """Write tokenizer.json, tokenizer.model or both to a folder with the family's tokenizer_config.json."""
    special = special_tokens(family)
    if family.vocabulary is Vocabulary.SMOLLM2:
        write_with_special_tokens(folder, family.vocabulary, dict(enumerate(special.values())))
        return
    if special.get(0) != "<pad>":  # Gemma's pieces differ from those of the file
        (folder / "tokenizer.model").write_bytes(_sentencepiece(family.vocabulary))
    if not family.sentencepiece_only:
        write_with_special_tokens(folder, family.vocabulary, special)


def write_with_special_tokens(folder: Path, vocabulary: Vocabulary, special: Mapping[int, str]) -> None:
    """Write a vocabulary as tokenizer.json, replacing the tokens at the given ids with these special tokens."""
    tokenizer = json.loads(_tokenizer_json(vocabulary))
    ordinary: dict[str, int] = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {name: number for name, number in ordinary.items() if number not in special} | {
        name: number for number, name in special.items()
    }
    if tokenizer["model"].get("unk_token"):
        tokenizer["model"]["unk_token"] = "<unk>"
    others = [token for token in tokenizer["added_tokens"] if token["id"] not in special]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": number, "content": name, **plain, "special": True} for number, name in special.items()]
    tokenizer["added_tokens"] = sorted([*others, *added], key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


@cache
def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, which is available on every machine that runs the tests."""
    from trainer.base_model.resolve import resolve_base

    return resolve_base("smollm2-135m-instruct", Settings().base_cache).folder


@cache
def smollm2_vocabulary_size() -> int:
    """Return the number of tokens in SmolLM2's vocabulary."""
    return int(json.loads((smollm2_folder() / "config.json").read_text("utf-8"))["vocab_size"])


def _sentencepiece(vocabulary: Vocabulary) -> bytes:
    return files("mistral_common").joinpath("data", _SENTENCEPIECE[vocabulary]).read_bytes()


@cache
def _tokenizer_json(vocabulary: Vocabulary) -> str:
    """Return a vocabulary as tokenizer.json text. Sentencepiece files are converted with transformers."""
    if vocabulary is Vocabulary.SMOLLM2:
        return (smollm2_folder() / "tokenizer.json").read_text("utf-8")
    from transformers import AutoTokenizer

    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "tokenizer.model").write_bytes(_sentencepiece(vocabulary))
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": False}), "utf-8")
        return str(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
