"""Tests that an answer's token limit is sufficient for its reference and never exceeds the context."""

from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.schema.tokenized_example import TokenizedExample
from trainer.evaluation.answer_limit import answer_limits, limit_of_text

SIZES = st.integers(1, 3000)


def example(prompt: int, answer: int) -> TokenizedExample:
    return TokenizedExample(tuple(range(prompt + answer)), ((prompt, prompt + answer),))


def limit(one: TokenizedExample, context: int = 10_000) -> int:
    (found,) = answer_limits([one], context=context, fixed=None)
    return found


def test_default_answer_limit_is_1_5_times_the_reference_length_plus_16_rounded_up() -> None:
    assert [limit(example(5, tokens)) for tokens in (1, 2, 3, 200)] == [18, 19, 21, 316]


@given(SIZES, SIZES, st.integers(0, 6000))
def test_answer_limit_covers_the_reference_and_fits_into_the_remaining_context(
    prompt: int, answer: int, spare: int
) -> None:
    context = prompt + answer + spare
    found = limit(example(prompt, answer), context)
    assert answer <= found <= context - prompt
    assert found == context - prompt or 1.5 * answer + 16 <= found < 1.5 * answer + 17


def test_answer_limit_depends_only_on_the_last_trained_answer() -> None:
    of_two = TokenizedExample(tuple(range(120)), ((10, 100), (110, 120)))
    assert limit(of_two) == 31
    assert limit(of_two, context=125) == 15


def test_configured_answer_limit_is_the_same_for_every_example() -> None:
    assert answer_limits([example(5, 1), example(5, 200)], context=64, fixed=8) == (8, 8)


@given(st.text())
def test_answer_limit_allows_one_token_per_byte_when_there_is_no_tokenizer(reference: str) -> None:
    assert limit_of_text(reference) >= 1.5 * len(reference.encode()) + 16
