"""Reads vLLM server arguments the way vLLM does.

This ensures that a user's `engine.args` are neither passed twice nor overridden. A file given by
`--config` is not read.
"""

from collections.abc import Sequence


def given(arguments: Sequence[str], *options: str) -> str | None:
    """Return an option's value in vLLM's arguments: `--block-size 32`, `--block_size=32`, or a name prefix.

    Args:
        options: the option's names, including their dashes.

    Returns:
        The last value given, which takes effect; empty for a flag; None if the option is not given.
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
    """Return True if the arguments contain `--FLAG`, False if `--no-FLAG`, or None if neither."""
    enabled = None
    for argument in arguments:
        if given([argument], f"--{flag}") is not None:
            enabled = True
        elif given([argument], f"--no-{flag}") is not None:
            enabled = False
    return enabled


def parses_calls(arguments: Sequence[str]) -> bool:
    """Return whether the arguments name a tool call parser, so that vLLM finds the calls in answers."""
    return bool(given_flag(arguments, "enable-auto-tool-choice") and given(arguments, "--tool-call-parser"))
