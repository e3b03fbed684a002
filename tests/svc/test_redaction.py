"""Tests that private data are redacted, that similar texts are not, and that no text makes redaction slow."""

import re
import threading
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.redaction import LIMIT_S, PLACEHOLDERS, RedactionTimeoutError, Redactor

REDACTOR = Redactor()


@pytest.mark.parametrize(
    "mail", ["a@b.de", "jane.doe+x@mail.example.co.uk", "JANE_DOE@EXAMPLE.COM", "müller@müller.de", "x%y@a-b.org"]
)
def test_email_addresses_are_redacted(mail: str) -> None:
    assert REDACTOR.text(f"Write to {mail}, please.") == "Write to [mail], please."


@pytest.mark.parametrize(
    "phone",
    [
        "+49 30 901820",
        "+49 (0)30 / 901820",
        "+1 415 555 2671",
        "+14155552671",
        "0049 30 901820",
        "030 901820",
        "030/901820-12",
        "0171 2345678",
        "(415) 555-2671",
        "415-555-2671",
        "415.555.2671",
        "01 42 68 53 00",
        "(415)555-2671",
        "+44\u20117911\u2011123456",
        "+33\u00a01\u00a042\u00a068\u00a053\u00a000",
    ],
)
def test_phone_numbers_are_redacted(phone: str) -> None:
    assert REDACTOR.text(f"Call {phone}.") == "Call [phone]."


@pytest.mark.parametrize(
    "card",
    [
        "4111 1111 1111 1111",
        "4111111111111111",
        "5500-0000-0000-0004",
        "378282246310005",
        "4111.1111.1111.1111",
        "4111\u00a01111\u00a01111\u00a01111",
    ],
)
def test_card_numbers_are_redacted(card: str) -> None:
    assert REDACTOR.text(f"Card {card}!") == "Card [card]!"


@pytest.mark.parametrize(
    "text",
    [
        "on 2026-11-24 at 10:30:15",
        "2026-11-24T10:30:15Z",
        "version 1.24.3 of 192.168.10.12",
        "costs 1,299.00 or 12999",
        "pi is 3.14159265358979",
        "about 0.1234567890",
        "order 1234567",
        "4111 1111 1111 1112",  # fails its check digit
        "me @home, look@me",
        "10000000 bytes",
        "sha256 7f83b1657ff1fc53b92dc18148a1d65dfc2d4b1fa3d677284addd200126d9069",
    ],
)
def test_non_sensitive_numbers_are_unchanged(text: str) -> None:
    assert REDACTOR.text(text) == text


@pytest.mark.parametrize(
    "secret",
    [
        "ts_abcd0123_0123456789abcdefghijklmnopqrstuvWXYZ01",
        "ts_abcd0123_0123456789abcdefghij",  # cut short
        "ts_00000000_41111111111111111111111111111111111111",  # a card number in it
    ],
)
def test_service_api_keys_are_redacted(secret: str) -> None:
    arounds = ["{}", "Bearer {}", "'{}'", "key={}&x=1", "{}.", "https://x:{}@host/"]
    redacted = [REDACTOR.text(around.replace("{}", secret)) for around in arounds]
    assert redacted == [around.replace("{}", "[key]") for around in arounds]


@pytest.mark.parametrize(
    "text", ["ts_abcd0123", "ts_config_file", "its_abcd0123_0123456789abcdef", "ts_abcd0123_short"]
)
def test_text_that_only_resembles_an_api_key_is_not_redacted(text: str) -> None:
    assert REDACTOR.text(text) == text


def test_api_key_is_redacted_completely_even_if_a_custom_pattern_matches_part_of_it() -> None:
    assert Redactor([r"\d+"]).text("ts_abcd0123_0a1b2c3d4e5f6789abcdefgh") == "[key]"


@pytest.mark.parametrize("around", ["id-{}", "{}-", "{} 12", "{},{}"])
def test_card_number_is_redacted_even_if_text_is_adjacent_to_it(around: str) -> None:
    assert REDACTOR.text(around.replace("{}", "4111111111111111")) == around.replace("{}", "[card]")


def test_custom_patterns_take_precedence_over_built_in_patterns() -> None:
    assert Redactor([r"TICKET-\d+", r"jane@\S+"]).text("TICKET-12 of jane@b.de") == "[redacted] of [redacted]"


def test_nested_strings_are_redacted_at_any_depth() -> None:
    value = [
        {"role": "user", "content": [{"type": "text", "text": "a@b.de"}], "n": 4111111111111111, "x": [None, True, 7]}
    ]
    blanked = [{"role": "user", "content": [{"type": "text", "text": "[mail]"}], "n": "[card]", "x": [None, True, 7]}]
    assert REDACTOR.strings(value) == blanked


def test_json_object_keys_are_redacted() -> None:
    assert REDACTOR.strings([{"a@b.de": {"4111111111111111": 1}}]) == [{"[mail]": {"[card]": 1}}]


@pytest.mark.slow
@given(st.from_regex(r"[a-z0-9._%+-]{1,30}@([a-z0-9-]{1,20}\.){1,3}[a-z]{2,10}", fullmatch=True), st.text(max_size=20))
def test_no_email_address_survives_redaction(mail: str, after: str) -> None:
    assert mail not in REDACTOR.text(f"{mail} {after}")


@given(st.integers(10**11, 10**18 - 1), st.sampled_from(["", " ", "-"]))
def test_no_number_with_a_valid_check_digit_survives_redaction(stem: int, between: str) -> None:
    card = next(f"{stem}{digit}" for digit in range(10) if _checks(f"{stem}{digit}"))
    written = between.join(card[index : index + 4] for index in range(0, len(card), 4))
    assert REDACTOR.text(f"({written})") == "([card])"


def _checks(number: str) -> bool:
    total = 0
    for index, digit in enumerate(reversed(number)):
        value = int(digit) * (2 if index % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


@given(st.text())
def test_redaction_is_idempotent(text: str) -> None:
    once = REDACTOR.text(text)
    assert REDACTOR.text(once) == once


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit", ["a", "a.", "1", "1 ", "a@", "+1", "0", "(1", "- ", "a@b.", "00", "ts_", "ts_abcd0123_"]
)
def test_redaction_takes_little_time_for_any_text(unit: str) -> None:
    """Ten times the text takes about ten times as long, rather than a hundred times."""

    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        started = time.thread_time()  # a busy machine must not count as a slow text
        REDACTOR.text(text)
        return time.thread_time() - started

    seconds(1000)
    assert seconds(200_000) < 40 * seconds(20_000) + 0.05


@pytest.mark.parametrize(
    "secret", ["a@b.de", "4111 1111 1111 1111", "+49 30 901820", "order 77", "ts_abcd0123_0123456789abcdefghijkl"]
)
def test_redacted_text_is_marked_with_a_placeholder(secret: str) -> None:
    blanked = Redactor([r"order \d+"]).text(f"It is {secret}.")
    assert [placeholder in blanked for placeholder in PLACEHOLDERS].count(True) == 1


SLOW = "(a|aa)+$"
ENDLESS = "a" * 200 + "!"
"""Text on which the slow pattern would run for years."""


def blank_endless() -> None:
    with pytest.raises(RedactionTimeoutError) as raised:
        Redactor(["b", SLOW]).text(ENDLESS)
    assert raised.value.pattern == SLOW
    assert SLOW in str(raised.value)
    assert ENDLESS not in str(raised.value)


@pytest.mark.slow
def test_custom_redaction_pattern_exceeding_the_time_limit_is_stopped() -> None:
    began = time.monotonic()
    blank_endless()
    assert time.monotonic() - began < 8 * LIMIT_S


@pytest.mark.slow
def test_redaction_time_limit_applies_to_all_strings_of_a_value_combined() -> None:
    began = time.monotonic()
    with pytest.raises(RedactionTimeoutError):
        Redactor([SLOW]).strings([{"content": "a" * 20 + "!"}] * 100_000)
    assert time.monotonic() - began < 8 * LIMIT_S


@pytest.mark.slow
def test_other_threads_keep_running_while_a_slow_pattern_is_matched() -> None:
    working = threading.Thread(target=blank_endless)
    working.start()
    turns = 0
    while working.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20


@pytest.mark.parametrize("pattern", [r"(?<!x)TICKET-\d+(?=\b)", r"(?i)ticket-\d{2,}", r"[[T]ICKET-12", r"\bT\w+-\d+\b"])
def test_custom_patterns_behave_like_the_python_re_module(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = re.sub(pattern, "[redacted]", "TICKET-12 and ticket-77")
        assert Redactor([pattern]).text("TICKET-12 and ticket-77") == expected
