"""Tests SentencePiece tokenizers in GGUF: token ids on a real tokenizer and a small one, and what the file contains."""

from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.errors import TrainingError
from trainer.export.gguf.sentencepiece import SentencePiece
from trainer.export.gguf.tokens import choose_pre_tokenizer
from trainer.export.gguf.writer import GgufType, export_gguf

ROOT = Path(__file__).parents[4]
LLAMA_2 = ROOT / ".venv" / "tokenizers" / "tokenizer-llama2"
PIECES = ("\u2581", "a", "b", "c", "ab", "bc", "\u2581ab", "abc")
TEMPLATE = "{% for message in messages %}{{ bos_token + message.content + eos_token }}{% endfor %}"


def make_tokenizer(*, prefix: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer in the form of Llama 2's, whose only merges are of `a`, `b` and `c`."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {piece: 259 + place for place, piece in enumerate(PIECES)}
    merges = [("b", "c"), ("a", "b"), ("\u2581", "ab"), ("a", "bc")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.ByteFallback()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("prefix", [True, False])
def test_space_prefix_option_is_detected_by_comparing_token_ids(*, prefix: bool) -> None:
    texts = ["<s>abc</s>", "<s>ab abc  x\u00e9\n</s><s>bcabc", "abc"]
    chosen = choose_pre_tokenizer(make_tokenizer(prefix=prefix), texts)
    assert isinstance(chosen, SentencePiece)
    assert chosen.prefix is prefix


def test_tokenizer_whose_merges_cannot_be_expressed_as_scores_is_rejected() -> None:
    """llama.cpp merges every pair in the vocabulary; this tokenizer merges only listed pairs, without `aa`."""
    tokenizer = make_tokenizer()
    content = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    content.model = models.BPE(
        content.get_vocab() | {"aa": 300}, [("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    changed = PreTrainedTokenizerFast(tokenizer_object=content, bos_token="<s>", eos_token="</s>")
    with pytest.raises(TrainingError, match=r"^1 of 7 texts .* would have different token ids"):
        choose_pre_tokenizer(changed, ["<s>aab", "<s>ab"])


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_2.is_dir(), reason="npm could not fetch the tokenizer")
def test_published_llama_2_tokenizer_is_accepted_when_checked_on_real_texts() -> None:
    examples = read_examples(ROOT / "examples" / "debian-triage" / "heldout.jsonl")[:100]
    texts = [
        f"<s>[INST] {message.content} [/INST] \u65e5\u672c \U0001f642 </s>" for e in examples for message in e.messages
    ]
    chosen = choose_pre_tokenizer(AutoTokenizer.from_pretrained(LLAMA_2), texts)
    assert isinstance(chosen, SentencePiece)


@pytest.mark.slow
def test_gguf_file_has_scores_and_types_of_a_sentencepiece_vocabulary(
    tmp_path: Path, examples: list[ChatExample]
) -> None:
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **shape))
    model.bfloat16().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    done = export_gguf(tmp_path / "base", tmp_path / "out", "tiny", examples, type=GgufType.F16, modelfile=False)
    assert done.pre == "sentencepiece"
    fields = gguf.GGUFReader(done.file).fields
    content = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    assert content["model"] == "llama"
    assert content["add_space_prefix"] is True
    kinds = gguf.TokenType
    types = [kinds(value) for value in content["token_type"]]
    assert types[:4] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE]
    assert set(types[259:]) == {kinds.NORMAL}
    scores = dict(zip(content["tokens"], content["scores"], strict=True))
    assert scores["bc"] > scores["ab"] > scores["\u2581ab"] > scores["abc"]
    assert "merges" not in content
