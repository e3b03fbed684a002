"""Tests that doubtful texts are reported, and that texts that only look doubtful are not."""

import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.checks.check import TextChecks
from svc.dataset.problem.problem import Code

GOOD = [
    "Use a < b || c > d, x |> f, and [| 1; 2 |] in F#.",
    "[INSTALL] the <section> with <span> and <sub>; <s3> is no tag",
    r"$\frac{{a}}{{b}}$ and \textbf{x}",
    "${{ secrets.TOKEN }} in a workflow",
    'the {% crispy %} tag, {"a": {"b": 1}} and {"a": {}}',
    "MANHÃ… IRMÃ” «DÉJÀ» CAFÉ» São Paulo, Ångström, Þórr, naïve – “quotes” … 5 €",  # noqa: RUF001
    "Tiếng Việt, čeština, Ελληνικά, русский, 日本語, עברית, العربية, हिन्दी",
    "tab\tline\nfeed\r\n and a next line\x85 and \u2028",
    "3 Å², 4 Å·mol, 5 Å±1, «âge» »Ü« »Ä« à «â» Â. Ã.",
    "int a[2] = {{1, 2}}; vector v{{{3}}}; auto w = {{-4}}; {{a, b}} is a set of a set",
    "f'a {{\n  background-color: rgb(1, 2, 3);\n}} b {{ margin: 0 -1px; }}'",
    "f'{{{name}}}' is {name} in braces",
    "xs |> f <| y; p <|> q; a <turn> of <channel>",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f is England",
    "\u2066isolated\u2069 \u200ftext",
    "emoji 👩‍👩‍👧 ✔ ™ © ® °",
]


def codes(text: str, *tokens: str) -> set[Code]:
    return {code for code, _ in TextChecks(tokens).problems(text)}


@pytest.mark.parametrize("text", GOOD)
def test_valid_texts_have_no_problems(text: str) -> None:
    assert codes(text) == set()


@pytest.mark.parametrize(
    "text",
    [
        *("{{ 7*7 }}", "{{user.name}}", "{{ x | upper }}", "a {%- if x -%} b", "{% set x = 1 %}", "{# note #}"),
        *("{{ a == b }}", "{{ x if y else z }}", "{{ a and not b }}", "{{ x['k'] }}", "{{ f(1) }}", "{{- x -}}"),
    ],
)
def test_template_code_in_text_is_reported(text: str) -> None:
    assert codes(text) == {Code.TEMPLATE_CODE}


def test_special_tokens_of_known_model_families_are_reported() -> None:
    texts = [
        *("<|im_end|>", "<｜end▁of▁sentence｜>", "[AVAILABLE_TOOLS]", "x</s>", "<eos>"),  # noqa: RUF001
        *("<|turn>model", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<tool_response|>"),
        *("<|im_start|>system", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end|>", "<|user|>", "<bos>"),
        *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<start_of_turn>", "<end_of_turn>", "<s>"),
    ]
    assert [text for text in texts if codes(text) != {Code.SPECIAL_TOKEN}] == []


@pytest.mark.parametrize(
    "text", ["a\u202eb", "a\U000e0041\U000e0042", "🏴 \U000e0067", "\U000e007f", "\U000e0020x"], ids=ascii
)
def test_characters_that_hide_text_are_reported(text: str) -> None:
    assert codes(text) == {Code.CONTROL_CHARACTER}


@pytest.mark.parametrize("text", ["caf\ufffd", "\ufffdtat"], ids=ascii)
def test_replacement_characters_for_lost_bytes_are_reported(text: str) -> None:
    assert codes(text) == {Code.MOJIBAKE}


@given(st.text(alphabet="äöüéèñçßøåžšł€–“”’ž", min_size=1, max_size=9), st.text("abc", min_size=1, max_size=5))  # noqa: RUF001
def test_wrongly_decoded_text_is_reported(wrong: str, around: str) -> None:
    decoded = wrong.encode().decode("cp1252", "replace")
    assert "\ufffd" in decoded or Code.MOJIBAKE in codes(around + decoded + around)


def test_short_texts_wrongly_decoded_as_windows_1252_are_reported() -> None:
    originals = ("é", "ü", "naïve", "–", "’", "“x", "€", "°", "ß", "привет", "日本")  # noqa: RUF001
    assert [text for text in originals if codes(text.encode().decode("cp1252")) != {Code.MOJIBAKE}] == []


SENTENCES = {
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Danish": "Høj bly gom vandt fræk sexquiz på wc, æble og å",
    "Estonian": "Põdur Zagrebi tšellomängija-följetonist Ciqo külmetas kehvas garaažis",
    "French": "Dès Noël où un zéphyr haï me vêt de glaçons würmiens, Œuvre naïve à l'Haÿ",
    "German": "»Übermäßige Ängste öden Größere an«, schrieb er",
    "Hungarian": "Árvíztűrő tükörfúrógép",
    "Latvian": "Glāžšķūņa rūķīši dzērumā čiepj Baha koncertflīģeļu vākus",
    "Polish": "Zażółć gęślą jaźń",
    "Portuguese": "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim; irmã, maçã, pão",
    "Romanian": "Gheorghe, obezul, a reușit să obțină jucându-se un flux în Quebec de o mie kilowațioră",
    "Slovak": "Kŕdeľ šťastných ďatľov učí pri ústí Váhu mĺkveho koňa obhrýzať kôru",
    "Spanish": "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia, ¿añoraba a su querido cachorro?",
    "Swedish": "Flygande bäckasiner söka hwila på mjuka tuvor, Ångström",
    "Turkish": "Pijamalı hasta yağız şoföre çabucak güvendi, İstanbul",  # noqa: RUF001
    "Vietnamese": "Tiếng Việt có dấu, người Việt",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "Russian": "Съешь же ещё этих мягких французских булок",
    "Hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "Japanese": "いろはにほへと ちりぬるを",
}


def garbled(text: str) -> str:
    """Return UTF-8 decoded as Windows-1252, with its five undefined bytes decoded as Latin-1."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())


@pytest.mark.parametrize("language", SENTENCES)
def test_sentence_is_distinguished_from_its_wrongly_decoded_form(language: str) -> None:
    sentence = SENTENCES[language]
    assert (codes(sentence), codes(sentence.upper())) == (set(), set())
    assert Code.MOJIBAKE in codes(garbled(sentence))


def test_wrongly_decoded_text_is_quoted_with_its_position() -> None:
    [(code, text)] = TextChecks().problems("3 Å², \x85 cafÃ©")
    assert code is Code.MOJIBAKE
    assert text.endswith("'fÃ©' at 10")


def test_configured_special_tokens_are_detected_in_text() -> None:
    assert codes("here ⟪end⟫ there", "⟪end⟫") == {Code.SPECIAL_TOKEN}
    assert codes("here ⟪end⟫ there") == set()


@pytest.mark.slow
def test_text_check_time_is_proportional_to_text_length() -> None:
    begins = ["", "{{", "{{a", "{{a|", "{% if", "{{ a ", "{#"]
    parts = ["{{[", "[", "{{a|", " ", "{{a ", "{% if ", "{#", "{{ a if", "{{1", "<|", "Ã"]
    seconds: dict[tuple[str, str], float] = {}
    for begin, part in product(begins, parts):
        began = time.process_time()
        codes(begin + part * (60_000 // len(part)))
        seconds[begin, part] = time.process_time() - began
    assert {text: taken for text, taken in seconds.items() if taken >= 2} == {}


@given(st.text())
def test_text_checks_can_be_run_on_any_text(text: str) -> None:
    assert codes(text) <= {Code.SPECIAL_TOKEN, Code.TEMPLATE_CODE, Code.CONTROL_CHARACTER, Code.MOJIBAKE}
