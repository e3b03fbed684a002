"""The generated pages are up to date."""

import pytest

from docs.generate import FOLDER, pages
from svc.settings import setting_keys
from trainer.recipe.file import recipe_keys


@pytest.mark.parametrize("name", pages())
def test_a_generated_page_is_current(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == pages()[name], "run `make docs`"


@pytest.mark.parametrize(("name", "keys"), [("configuration.md", setting_keys()), ("recipe.md", recipe_keys())])
def test_every_key_has_a_row(name: str, keys: list[str]) -> None:
    page = pages()[name]
    assert [key for key in keys if f"| `{key}` |" not in page] == []
