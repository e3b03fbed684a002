"""Tests that the generated pages are up to date."""

from docs.generate import FOLDER, pages
from svc.settings.load import setting_keys
from trainer.recipe.file import recipe_keys


def test_generated_pages_are_up_to_date() -> None:
    generated = pages()
    assert [name for name in generated if (FOLDER / name).read_text("utf-8") != generated[name]] == [], (
        "run `make docs`"
    )


def test_every_setting_and_recipe_key_has_a_table_row() -> None:
    generated = pages()
    for name, keys in (("configuration.md", setting_keys()), ("recipe.md", recipe_keys())):
        assert [key for key in keys if f"| `{key}` |" not in generated[name]] == [], name
