"""Chooses llama.cpp's pre-tokenizer for a model, and checks that it gives the same token ids as the base's tokenizer.

A GGUF file names llama.cpp's pre-tokenizer instead of containing one. A wrong name changes the ids of a few texts and
has no other symptom: SmolLM2 seems to work with `smollm`, although it splits some texts differently. The name is
therefore chosen by comparing token ids on real texts. The regular expressions below are llama.cpp's; a test compares
them with llama.cpp itself. This module does not write files.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from svc.errors import TrainingError
from trainer.export.gguf.sentencepiece import SentencePiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SAMPLES = (
    "Numbers 7, 42, 365, 2024 and 1234567.89",
    "don't DON'T we'll WE'LL",
    '(a) [b] {c} "d" -e /f .g #h $i',
    "end.\n\nnext;\r\n\r\n\tindented\n  twice\n",
    "caf\u00e9 stra\u00dfe \u65e5\u672c\u8a9e \U0001f642\U0001f642",
)
"""Texts that llama.cpp's pre-tokenizers split differently, in case the held-out examples contain no such texts."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers.

    Attributes:
        name: value of `tokenizer.ggml.pre`.
        expressions: regular expressions that are applied one after another to split a text.
        ignore_merges: whether a piece in the vocabulary is a token even if no merges lead to it.
    """

    name: str
    expressions: tuple[str, ...]
    ignore_merges: bool = False


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("smollm", (r"\p{N}", _GPT2)),
    PreTokenizer("qwen2", (rf"{_WORDS}|\p{{N}}{_LINES}",)),
    PreTokenizer("llama-bpe", (rf"{_WORDS}|\p{{N}}{{1,3}}{_LINES}",), ignore_merges=True),
)


def read_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the contents of a tokenizer's tokenizer.json.

    Raises:
        TrainingError: the tokenizer is neither byte-level BPE nor SentencePiece's BPE.
    """
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    splits = content.get("pre_tokenizer") or {}
    kinds = {part.get("type") for part in splits.get("pretokenizers", [splits])}
    if content["model"].get("type") != "BPE" or ("ByteLevel" not in kinds and not has_bytes(content)):
        raise TrainingError(
            f"the tokenizer {tokenizer.name_or_path} is neither byte-level BPE nor SentencePiece BPE with byte "
            "fallback",
            expected="a tokenizer of the kind used by Llama 2, Llama 3, SmolLM2 or Qwen",
            todo="export the version as hf, and convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    return content


def has_bytes(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer splits characters that have no token into bytes, as SentencePiece tokenizers do."""
    return bool(content["model"].get("byte_fallback")) and "<0x00>" in content["model"]["vocab"]


def choose_pre_tokenizer(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> PreTokenizer | SentencePiece:
    """Return the first of llama.cpp's pre-tokenizers that gives the same token ids as the base's tokenizer for every
    text, including `_SAMPLES`.

    Args:
        tokenizer: the base's tokenizer.
        texts: rendered held-out examples, with answers.

    Raises:
        TrainingError: no pre-tokenizer gives these ids, or the kind of tokenizer is not supported.
    """
    content = read_tokenizer(tokenizer)
    # Some SentencePiece tokenizers put a space before a whole text, but not after a special token as in conversations.
    start = tokenizer.bos_token or "" if has_bytes(content) else ""
    texts = (*texts, *(start + sample for sample in _SAMPLES))
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    pieces = (SentencePiece(content, prefix=True), SentencePiece(content, prefix=False))
    differ: dict[str, int] = {}
    for pre in pieces if has_bytes(content) else PRE_TOKENIZERS:
        found = encode(content, pre, texts)
        wrong = sum(before != after for before, after in zip(wanted, found, strict=True))
        differ[pre.name] = min(wrong, differ.get(pre.name, wrong))
        if not wrong:
            return pre
    best = min(differ, key=lambda name: differ[name])
    raise TrainingError(
        f"{differ[best]} of {len(texts)} texts (the held-out examples and {len(_SAMPLES)} samples) would have "
        f"different token ids in llama.cpp, even with its pre-tokenizer {best!r}",
        expected="a pre-tokenizer of llama.cpp that gives the same token ids as the base's tokenizer for every text "
        f"(tried: {', '.join(differ)})",
        todo="export the version as hf; the model would answer differently in llama.cpp",
    )


def encode(content: dict[str, Any], pre: PreTokenizer | SentencePiece, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids that llama.cpp assigns to each text.

    Args:
        content: contents of the base's tokenizer.json.
    """
    if isinstance(pre, SentencePiece):
        return [pre.encode(text) for text in texts]
    return [encoded.ids for encoded in simulate(content, pre).encode_batch(texts, add_special_tokens=False)]


def simulate(content: dict[str, Any], pre: PreTokenizer) -> "Tokenizer":
    """Return a tokenizer that reproduces how llama.cpp splits texts with a given pre-tokenizer.

    llama.cpp does not normalize texts, and text around special tokens keeps its spaces.

    Args:
        content: contents of the base's tokenizer.json.
    """
    from tokenizers import Tokenizer

    splits = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in pre.expressions
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    changed = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "added_tokens": [token | plain for token in content.get("added_tokens", [])],
        "model": content["model"] | {"ignore_merges": pre.ignore_merges},
    }
    return Tokenizer.from_str(json.dumps(content | changed))
