"""Tests that imports run without the garbage collector."""

import gc

import pytest

from svc.imports import without_garbage_collection


def test_garbage_collector_is_off_only_while_importing() -> None:
    with without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_garbage_collector_is_on_again_after_a_failed_import() -> None:
    with pytest.raises(ImportError), without_garbage_collection():
        raise ImportError
    assert gc.isenabled()


def test_imported_objects_are_not_searched_for_garbage() -> None:
    with without_garbage_collection():
        imported: list[object] = [[]]
    assert not any(thing is imported for thing in gc.get_objects())
