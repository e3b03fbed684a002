"""The limit of an answer suffices for its reference, and never exceeds the context."""

from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.evaluation.answer_limit import answer_limits, limit_of_text

SIZES = st.integers(1, 3000)


def example(prompt: int, answer: int) -> TokenizedExample:
    return TokenizedExample(tuple(range(prompt + answer)), ((prompt, prompt + answer),))


def limit(one: TokenizedExample, context: int = 10_000) -> int:
    (found,) = answer_limits([one], context=context, fixed=None)
    return found


def test_limit_is_half_again_the_reference_and_sixteen_rounded_up_when_nothing_is_fixed() -> None:
    assert [limit(example(5, tokens)) for tokens in (1, 2, 3, 200)] == [18, 19, 21, 316]


@given(SIZES, SIZES, st.integers(0, 6000))
def test_limit_has_room_for_the_reference_and_stays_in_the_context_when_the_example_fits(
    prompt: int, answer: int, spare: int
) -> None:
    context = prompt + answer + spare
    found = limit(example(prompt, answer), context)
    assert answer <= found <= context - prompt
    assert found == context - prompt or 1.5 * answer + 16 <= found < 1.5 * answer + 17


def test_only_the_last_answer_counts_when_several_are_learnt() -> None:
    of_two = TokenizedExample(tuple(range(120)), ((10, 100), (110, 120)))
    assert limit(of_two) == 31
    assert limit(of_two, context=125) == 15


def test_limit_is_the_same_for_every_example_when_it_is_fixed() -> None:
    assert answer_limits([example(5, 1), example(5, 200)], context=64, fixed=8) == (8, 8)


@given(st.text())
def test_limit_of_a_text_has_room_for_one_token_per_byte_when_the_tokenizer_is_unknown(reference: str) -> None:
    assert limit_of_text(reference) >= 1.5 * len(reference.encode()) + 16
