"""Commands, recipes, snippets and links in the pages work."""

import re
import shlex
from pathlib import Path

import click
import pytest

from svc.cli import COMMANDS, group
from svc.settings import ENV_PREFIX, setting_keys
from tests.docs.pages import PAGES, ROOT, blocks, page_id, prose, read, rows
from trainer.recipe.file import load_recipe, recipe_keys

README = read("README.md")
TARGETS = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
COMMAND_LINES = [
    line
    for page in PAGES
    for block in blocks(page.read_text("utf-8"), "sh")
    for line in block.replace("\\\n", " ").splitlines()
]


def _words(line: str, program: str) -> list[str] | None:
    """Return the arguments of a program in a shell line; None if the line runs another program."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    return words[1:] if words and Path(words[0]).name == program else None


MAKE_LINES = [line for line in COMMAND_LINES if _words(line, "make") is not None]
SVC_LINES = [line for line in COMMAND_LINES if _words(line, "svc") is not None]


def test_the_readme_shows_demo_and_test() -> None:
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in MAKE_LINES}


@pytest.mark.parametrize("line", MAKE_LINES)
def test_every_make_target_exists(line: str) -> None:
    assert set(_words(line, "make") or []) <= TARGETS


@pytest.mark.parametrize("line", SVC_LINES)
def test_every_svc_command_parses(line: str) -> None:
    words = _words(line, "svc") or []
    command: click.Command = group
    context: click.Context | None = None
    while isinstance(command, click.Group) and (words or not command.invoke_without_command):
        # A group caches the help option of its first context, so contexts have their parents, as in a real run.
        context = click.Context(command, context, **command.context_settings)
        _, words, _ = command.make_parser(context).parse_args(words)  # the group's own options come first
        subcommand = command.get_command(context, words.pop(0))
        assert subcommand is not None
        command = subcommand
    command.make_context(
        command.name, words, **group.context_settings
    )  # raises on an unknown option, a missing or a surplus argument


def test_the_readme_has_the_table_of_commands() -> None:
    assert rows(README, "command") == [[f"`svc {name}`", text] for name, (_, text) in COMMANDS.items()]


def test_the_recipe_in_the_readme_parses(tmp_path: Path) -> None:
    [recipe] = blocks(README, "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, "utf-8")
    assert f"svc serve {load_recipe(path).name}" in README


def test_the_snippet_in_the_readme_compiles() -> None:
    [snippet] = blocks(README, "python")
    compile(snippet, "README.md", "exec")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_within_the_project_have_targets(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text("utf-8"))
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_source_files_exist(page: Path) -> None:
    named = re.findall(r"`((?:svc|trainer|serving|monitoring|deploy|docs|examples|tests)/[\w./-]*)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_keys_and_variables_exist(page: Path) -> None:
    text = prose(page.read_text("utf-8"))
    sections = {key.partition(".")[0] for key in [*setting_keys(), *recipe_keys()] if "." in key}
    keys = set(re.findall(rf"(?<![\w/])((?:{'|'.join(sections)})\.[a-z]\w+)(?![\w.]*\()", text))
    keys = {key for key in keys if Path(key).suffix not in (".md", ".py", ".log", ".lock", ".json", ".jsonl", ".yaml")}
    variables = set(re.findall(rf"\b{ENV_PREFIX}[A-Z][A-Z_]*", text))
    known = {ENV_PREFIX + key.upper().replace(".", "__") for key in setting_keys()}
    assert keys - {*setting_keys(), *recipe_keys()} == set()
    assert variables - known == set()
