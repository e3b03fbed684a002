"""Parses hand-written YAML. PyYAML raises various errors while converting values; here they all become
ValueError.
"""

from typing import Any

import yaml

_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text and return its value.

    Raises:
        ValueError: the text is not YAML, or contains an impossible value such as the date 2024-13-45 or
            `!!bool maybe`.
    """
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem}{where}") from None  # without the line's text, which may contain a password
    except _ERRORS as error:
        raise ValueError(str(error) if isinstance(error, yaml.YAMLError) else repr(error)) from error
