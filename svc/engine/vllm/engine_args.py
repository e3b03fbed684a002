"""What arguments of vLLM's server give, read as vLLM reads them.

So that what a person gives in `engine.args` is neither passed twice nor overruled. A file after `--config` is not read.
"""

from collections.abc import Sequence


def given(arguments: Sequence[str], *options: str) -> str | None:
    """What arguments of vLLM give for an option: `--block-size 32`, `--block_size=32`, or a beginning of its name.

    Args:
        options: its names, with their dashes.

    Returns:
        The last value, which is the one that counts; empty for a flag; None where it is not given.
    """
    found = None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not _is_one_of(name, options):
            continue
        following = "".join(arguments[index + 1 : index + 2])
        found = value if equals else "" if following.startswith("-") else following
    return found


def _is_one_of(name: str, options: Sequence[str]) -> bool:
    if not name.startswith("--"):
        return name in options
    # argparse takes any beginning that fits one option only, and ends vLLM for one that fits several.
    dashed = name.replace("_", "-")
    return len(dashed) > len("--") and any(option.startswith(dashed) for option in options if option.startswith("--"))


def given_flag(arguments: Sequence[str], flag: str) -> bool | None:
    """Whether arguments of vLLM switch something on (`--flag`) or off (`--no-flag`); None: neither."""
    found = None
    for argument in arguments:
        if given([argument], f"--{flag}") is not None:
            found = True
        elif given([argument], f"--no-{flag}") is not None:
            found = False
    return found
