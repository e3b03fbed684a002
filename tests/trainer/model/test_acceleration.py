"""Tests that training options are chosen according to the machine and its packages."""

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
def test_newest_installed_and_supported_attention_backend_is_selected(
    capability: tuple[int, int], packages: dict[str, bool], attention: Attention
) -> None:
    assert choose_acceleration(Facts(capability, **packages)).attention is attention


@given(FACTS)
def test_padding_free_batches_are_used_only_with_flash_attention(facts: Facts) -> None:
    chosen = choose_acceleration(facts)
    assert chosen.padding_free == (chosen.attention is not Attention.SDPA)


@given(st.fixed_dictionaries({package: st.booleans() for package in PACKAGES}))
def test_installed_acceleration_packages_are_ignored_for_cpu_training(packages: dict[str, bool]) -> None:
    assert choose_acceleration(Facts(None, **packages)) == choose_acceleration(Facts())


def test_cpu_training_does_not_use_gradient_checkpointing() -> None:
    assert not choose_acceleration(Facts()).gradient_checkpointing


def test_gpu_training_recomputes_activations() -> None:
    assert choose_acceleration(Facts(AMPERE)).gradient_checkpointing


@given(FACTS)
def test_flash_attention_is_not_used_when_the_model_does_not_support_it(facts: Facts) -> None:
    chosen = choose_acceleration(facts, flash=False)
    assert (chosen.attention, chosen.padding_free) == (Attention.SDPA, False)


def test_liger_kernels_are_used_when_installed() -> None:
    assert choose_acceleration(Facts(AMPERE, **ALL)).liger_kernels
    assert not choose_acceleration(Facts(AMPERE)).liger_kernels
    assert not choose_acceleration(Facts(AMPERE, **ALL), liger=False).liger_kernels


def test_flash_attention_is_not_detected_by_its_import_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 4 has the same import name as version 2, and only its distribution name differs."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("flash_attn"), "the test tests nothing"
    assert not machine_facts().flash_attention_2
