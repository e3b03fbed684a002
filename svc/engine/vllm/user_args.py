"""Reads vLLM server arguments by the same rules as vLLM.

Options in the user's `engine.args` are therefore neither passed twice nor overridden. A file given by `--config` is not
read.
"""

from collections.abc import Sequence


def given(arguments: Sequence[str], *options: str) -> str | None:
    """Return the value of an option in vLLM's arguments.

    As in vLLM, the option may be written as `--block-size 32`, `--block_size=32` or an abbreviation.

    Args:
        options: the names of the option, including the leading dashes.

    Returns:
        The last value given, which is the one that takes effect. It is empty for a flag, and None if the
        option is not given.
    """
    last = None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not _is_one_of(name, options):
            continue
        following = "".join(arguments[index + 1 : index + 2])
        last = value if equals else "" if following.startswith("-") else following
    return last


def _is_one_of(name: str, options: Sequence[str]) -> bool:
    if not name.startswith("--"):
        return name in options
    # argparse accepts any prefix that fits one option only, and exits for one that fits several.
    dashed = name.replace("_", "-")
    return len(dashed) > len("--") and any(option.startswith(dashed) for option in options if option.startswith("--"))


def given_flag(arguments: Sequence[str], flag: str) -> bool | None:
    """Return True if the arguments contain `--FLAG`, False if they contain `--no-FLAG`, or None if they contain
    neither.
    """
    enabled = None
    for argument in arguments:
        if given([argument], f"--{flag}") is not None:
            enabled = True
        elif given([argument], f"--no-{flag}") is not None:
            enabled = False
    return enabled


def parses_calls(arguments: Sequence[str]) -> bool:
    """Return whether the arguments set up a tool call parser, which vLLM needs to extract tool calls from answers."""
    return bool(given_flag(arguments, "enable-auto-tool-choice") and given(arguments, "--tool-call-parser"))
