"""Each machine gets the options that suit it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.model.acceleration import Attention, Facts, choose_acceleration, machine_facts

PACKAGES = ("flash_attention_2", "flash_attention_3", "liger_kernels")
ALL = dict.fromkeys(PACKAGES, True)
AMPERE, HOPPER, TURING, BLACKWELL = (8, 0), (9, 0), (7, 5), (10, 0)
FACTS = st.builds(
    Facts,
    cuda=st.booleans(),
    capability=st.none() | st.tuples(st.integers(6, 12), st.integers(0, 9)),
    **{package: st.booleans() for package in PACKAGES},
)


@pytest.mark.parametrize(
    ("capability", "packages", "attention"),
    [
        (HOPPER, ALL, Attention.FLASH_3),
        (HOPPER, ALL | {"flash_attention_3": False}, Attention.FLASH_2),
        (BLACKWELL, ALL, Attention.FLASH_2),
        (AMPERE, ALL, Attention.FLASH_2),
        (TURING, ALL, Attention.SDPA),
        (HOPPER, {}, Attention.SDPA),
    ],
)
def test_attention_is_the_newest_that_is_installed_and_runs(
    capability: tuple[int, int], packages: dict[str, bool], attention: Attention
) -> None:
    assert choose_acceleration(Facts(True, capability, **packages)).attention is attention


@given(FACTS)
def test_rows_go_without_padding_only_where_flash_attention_keeps_them_apart(facts: Facts) -> None:
    chosen = choose_acceleration(facts)
    assert chosen.padding_free == (chosen.attention is not Attention.SDPA)


@given(st.fixed_dictionaries({package: st.booleans() for package in PACKAGES}))
def test_what_is_installed_changes_nothing_on_a_cpu(packages: dict[str, bool]) -> None:
    assert choose_acceleration(Facts(False, None, **packages)) == choose_acceleration(Facts(cuda=False))


def test_a_cpu_keeps_activations() -> None:
    assert not choose_acceleration(Facts(cuda=False)).gradient_checkpointing


def test_a_gpu_computes_them_again() -> None:
    assert choose_acceleration(Facts(True, AMPERE)).gradient_checkpointing


@given(FACTS)
def test_a_model_that_cannot_use_flash_attention_gets_none(facts: Facts) -> None:
    chosen = choose_acceleration(facts, flash=False)
    assert (chosen.attention, chosen.padding_free) == (Attention.SDPA, False)


def test_liger_kernels_are_used_where_they_are_installed() -> None:
    assert choose_acceleration(Facts(True, AMPERE, **ALL)).liger_kernels
    assert not choose_acceleration(Facts(True, AMPERE)).liger_kernels


def test_a_package_of_another_project_is_no_flash_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 4 has the import name of 2; only its distribution shows that it cannot be used here."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("flash_attn"), "the test tests nothing"
    assert not machine_facts().flash_attention_2
