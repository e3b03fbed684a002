"""What a stage has finished with is freed before the next one starts."""

import weakref

from trainer.model.release_memory import release_memory


class Model:
    """Refers to itself, as a model and its trainer do."""

    def __init__(self) -> None:
        self.trainer = self


def test_what_refers_to_itself_is_freed() -> None:
    model = weakref.ref(Model())
    release_memory()
    assert model() is None
