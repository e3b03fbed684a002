"""Tests that commands, recipes, snippets and links in the pages work."""

import re
import shlex
from pathlib import Path

import pytest

from svc.cli import COMMANDS
from svc.settings.load import setting_keys
from svc.settings.settings import ENV_PREFIX
from tests.docs.pages import PAGES, ROOT, blocks, page_id, prose, read, rows
from tests.docs.svc_usage import usage_error
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
    """Return a program's arguments in a shell line, or None if the line runs a different program."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    return words[1:] if words and Path(words[0]).name == program else None


MAKE_LINES = [line for line in COMMAND_LINES if _words(line, "make") is not None]
SVC_LINES = [line for line in COMMAND_LINES if _words(line, "svc") is not None]


def test_readme_shows_the_demo_and_test_commands() -> None:
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in MAKE_LINES}


def test_every_make_target_in_the_docs_exists() -> None:
    assert [line for line in MAKE_LINES if not set(_words(line, "make") or []) <= TARGETS] == []


def test_every_svc_command_in_the_docs_parses() -> None:
    errors = {line: usage_error(_words(line, "svc") or []) for line in SVC_LINES}
    assert {line: error for line, error in errors.items() if error} == {}


def test_readme_contains_the_command_table() -> None:
    assert rows(README, "command") == [[f"`svc {name}`", text] for name, (_, text) in COMMANDS.items()]


def test_recipe_in_the_readme_parses(tmp_path: Path) -> None:
    [recipe] = blocks(README, "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, "utf-8")
    assert f"svc serve {load_recipe(path).name}" in README


def test_snippets_in_the_readme_compile() -> None:
    for snippet in blocks(README, "python"):
        compile(snippet, "README.md", "exec")


@pytest.mark.slow
def test_internal_links_in_the_docs_resolve() -> None:
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text("utf-8")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE) if target.is_file() else []
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub
            if not target.exists() or (anchor and anchor not in anchors):
                broken.append(f"{page_id(page)}: {link}")
    assert broken == []


def test_source_files_named_in_docs_exist() -> None:
    path = re.compile(r"`((?:svc|trainer|serving|monitoring|deploy|docs|examples|tests)/[\w./-]*)`")
    named = [(page_id(page), name) for page in PAGES for name in path.findall(page.read_text("utf-8"))]
    assert [f"{page}: {name}" for page, name in named if not (ROOT / name).exists()] == []


def test_configuration_keys_and_environment_variables_named_in_docs_exist() -> None:
    known = {*setting_keys(), *recipe_keys()}
    known |= {ENV_PREFIX + key.upper().replace(".", "__") for key in setting_keys()}
    sections = "|".join({key.partition(".")[0] for key in known if "." in key})
    key = re.compile(rf"(?<![\w/.])((?:{sections})\.[a-z]\w+)(?![\w.]*\()")
    variable = re.compile(rf"\b{ENV_PREFIX}[A-Z][A-Z_]*")
    files = (".md", ".py", ".log", ".lock", ".json", ".jsonl", ".yaml")
    unknown = []
    for page in PAGES:
        text = prose(page.read_text("utf-8"))
        named = {name for name in key.findall(text) if Path(name).suffix not in files}
        unknown += [f"{page_id(page)}: {name}" for name in {*named, *variable.findall(text)} - known]
    assert unknown == []
