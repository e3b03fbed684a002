"""Tests that a stage's unused memory is freed before the next stage starts."""

import weakref

from trainer.model.release_memory import release_memory


class Model:
    """An object in a reference cycle, as a model and its trainer are."""

    def __init__(self) -> None:
        self.trainer = self


def test_memory_is_freed_despite_a_reference_cycle() -> None:
    model = weakref.ref(Model())
    release_memory()
    assert model() is None
