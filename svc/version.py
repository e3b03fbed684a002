"""Names of models and their versions: `NAME`, `NAME@N`, `NAME@alias`."""

import re
from dataclasses import dataclass
from enum import StrEnum

from svc.errors import NotFoundError

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""Pattern for model names of at most 63 characters that are safe as folder names, as metric labels and in URLs."""
NUMBER_PATTERN = r"[1-9][0-9]{0,8}"


class Format(StrEnum):
    """Format in which a version is served, or exported for other programs (GGUF)."""

    ADAPTER = "adapter"
    MERGED = "merged"
    GPTQ = "gptq"
    AWQ = "awq"
    INT8 = "int8"
    FP8 = "fp8"
    GGUF = "gguf"


QUANTIZED_FORMATS = (Format.GPTQ, Format.AWQ, Format.INT8, Format.FP8)
"""Formats produced by quantizing the merged model."""
SERVED_FORMATS = (*QUANTIZED_FORMATS, Format.MERGED)
"""Formats that consist of a complete model, in a server's order of preference."""


class Alias(StrEnum):
    """A movable name for one of a model's versions."""

    PRODUCTION = "production"
    CANDIDATE = "candidate"
    SHADOW = "shadow"


@dataclass(frozen=True, slots=True, order=True)
class VersionId:
    """A version id, `NAME@N`. Numbers start at 1 and are never reused."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @classmethod
    def parse(cls, text: str) -> "VersionId":
        """Parse `NAME@N` into a version id.

        Raises:
            NotFoundError: the text does not have this form.
        """
        name, at, number = text.rpartition("@")
        if not at or not re.fullmatch(NAME_PATTERN, name) or not re.fullmatch(NUMBER_PATTERN, number):
            wrong = f"{text!r} is not a valid version"
            raise NotFoundError(wrong, expected="NAME@N, for example my-model@2", todo="list the versions: svc models")
        return cls(name, int(number))


@dataclass(frozen=True, slots=True)
class Target:
    """A version and the format in which it is served."""

    version: VersionId
    format: Format

    def __str__(self) -> str:
        return f"{self.version} ({self.format})"
