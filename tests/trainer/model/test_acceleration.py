"""Each machine gets the switches that are right for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.model.acceleration import Attention, Facts, choose_acceleration

ALL = frozenset({"flash_attn", "flash_attn_interface", "liger_kernel"})
AMPERE, HOPPER, TURING, BLACKWELL = (8, 0), (9, 0), (7, 5), (10, 0)
FACTS = st.builds(
    Facts,
    cuda=st.booleans(),
    capability=st.none() | st.tuples(st.integers(6, 12), st.integers(0, 9)),
    packages=st.frozensets(st.sampled_from(sorted(ALL))),
)


@pytest.mark.parametrize(
    ("capability", "packages", "attention"),
    [
        (HOPPER, ALL, Attention.FLASH_3),
        (HOPPER, ALL - {"flash_attn_interface"}, Attention.FLASH_2),
        (BLACKWELL, ALL, Attention.FLASH_2),
        (AMPERE, ALL, Attention.FLASH_2),
        (TURING, ALL, Attention.SDPA),
        (HOPPER, frozenset(), Attention.SDPA),
    ],
)
def test_attention_is_the_newest_that_is_installed_and_runs(
    capability: tuple[int, int], packages: frozenset[str], attention: Attention
) -> None:
    assert choose_acceleration(Facts(True, capability, packages)).attention is attention


@given(FACTS)
def test_rows_go_without_padding_only_where_flash_attention_keeps_them_apart(facts: Facts) -> None:
    chosen = choose_acceleration(facts)
    assert chosen.padding_free == (chosen.attention is not Attention.SDPA)


@given(st.frozensets(st.sampled_from(sorted(ALL))))
def test_what_is_installed_changes_nothing_on_a_cpu(packages: frozenset[str]) -> None:
    assert choose_acceleration(Facts(cuda=False, packages=packages)) == choose_acceleration(Facts(cuda=False))


def test_a_cpu_keeps_activations() -> None:
    assert not choose_acceleration(Facts(cuda=False)).gradient_checkpointing


def test_a_gpu_computes_them_again() -> None:
    assert choose_acceleration(Facts(True, AMPERE)).gradient_checkpointing


@given(FACTS)
def test_a_model_that_cannot_use_flash_attention_gets_none(facts: Facts) -> None:
    chosen = choose_acceleration(facts, flash=False)
    assert (chosen.attention, chosen.padding_free) == (Attention.SDPA, False)


def test_liger_kernels_are_used_where_they_are_installed() -> None:
    assert choose_acceleration(Facts(True, AMPERE, ALL)).liger_kernels
    assert not choose_acceleration(Facts(True, AMPERE)).liger_kernels
